"""The names that docs/architecture.md gives exist in the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/architecture.md").read_text()
FOLDERS = (ROOT / "nanovllm", ROOT)


def find(path: str) -> Path | None:
    return next((folder / path for folder in FOLDERS if (folder / path).exists()), None)


def defined_names(path: Path) -> set[str]:
    """Return the classes, functions and assigned names of a module, those in classes as "Class.name" as well."""
    names = set()

    def visit(nodes: list[ast.stmt], prefix: str) -> None:
        for node in nodes:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.update((node.name, prefix + node.name))
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            for target in targets:
                names.update(prefix + name.id for name in ast.walk(target or ast.Pass()) if isinstance(name, ast.Name))

    visit(ast.parse(path.read_text()).body, "")
    return names


def listed_modules() -> list[tuple[str, str]]:
    """Return the folder and the name of each module in the first columns of the tables of modules."""
    modules = []
    for folder, rows in re.findall(r"^\| modules in `([\w/]+)/` \|.*\n((?:\|.*\n)+)", TEXT, re.MULTILINE):
        names = [name for row in rows.splitlines() for name in re.findall(r"`([\w*]+)`", row.split("|")[1])]
        modules += [(folder, name) for name in names]
    return modules


@pytest.mark.parametrize("folder, name", listed_modules())
def test_modules_in_the_tables_of_the_architecture_document_exist(folder, name):
    assert [*(ROOT / folder).glob(f"{name}.py"), *(ROOT / folder / name).glob("*.py")]  # a module, or a folder of them


def test_architecture_document_has_tables_of_the_modules_of_server_and_ray():
    assert {folder for folder, _ in listed_modules()} == {"nanovllm/server", "nanovllm/ray"}


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)+(?:\w+\.py)?)[:`]", TEXT))))
def test_files_in_the_architecture_document_exist(path):
    assert find(path)


@pytest.mark.parametrize("path, name", sorted(set(re.findall(r"`((?:\w+/)+\w+\.py):([\w.]+)`", TEXT))))
def test_names_in_the_architecture_document_are_defined_in_their_files(path, name):
    file = find(path)
    assert file and name in defined_names(file)
