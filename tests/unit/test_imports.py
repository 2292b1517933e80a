"""The structure: imports go down the layout, without cycles."""

import ast
from pathlib import Path

import nanovllm

PACKAGE = Path(nanovllm.__file__).parent

# From top to bottom: a file may import from its own layer's folder and from the layers below.
LAYERS = [
    ["ray"],  # at the top, so that nothing else imports it
    ["__main__"],
    ["cli"],
    ["server"],
    ["as_vllm"],
    ["__init__"],
    ["async_llm"],
    ["llm"],
    ["vllm_engine", "input_threads"],
    ["engine"],
    ["executor", "sandbox"],
    ["runner"],
    ["checkpoints"],
    ["models"],
    ["layers"],
    ["utils"],
    ["attention"],
    ["weights"],
    ["distributed"],
    ["ops"],
    ["messages"],
    ["config", "sampling_params", "structured_outputs", "inputs", "output_stream", "outputs"],
    ["vllm_options"],
    ["checks", "arithmetic", "progress"],
    ["library_errors"],
]


def imports() -> dict[str, set[str]]:
    """Return what each module of the package imports from it, type-checking and local imports included."""
    names = {path: _module_name(path) for path in PACKAGE.rglob("*.py")}
    graph: dict[str, set[str]] = {name: set() for name in names.values()}
    for path, name in names.items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path} has a relative import"
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for target in targets:
                while target and target not in graph:
                    target = target.rpartition(".")[0]
                if target and target != name:
                    graph[name].add(target)
    return graph


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _layer(module: str) -> int:
    room = [*module.split("."), "__init__"][1]
    found = [i for i, rooms in enumerate(LAYERS) if room in rooms]
    assert found, f"{module} is in no layer of {Path(__file__).name}"
    return found[0]


def test_modules_import_each_other_without_cycles():
    graph, done, path = imports(), set(), []

    def visit(module: str) -> None:
        assert module not in path, f"import cycle: {' -> '.join([*path[path.index(module) :], module])}"
        if module in done:
            return
        path.append(module)
        for target in sorted(graph[module]):
            visit(target)
        path.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


def test_imports_only_go_down_the_layout():
    upward = [
        f"{module} imports {target}"
        for module, targets in imports().items()
        for target in targets
        if _layer(target) < _layer(module)
    ]
    assert not upward


def test_the_control_plane_imports_no_torch():
    graph = imports()
    direct = {name for name in graph if "torch" in {n.split(".")[0] for n in _imported_packages(name)}}
    for module in ("messages", "engine.sequence", "engine.block_manager", "engine.scheduler"):
        reached, queue = set(), [f"nanovllm.{module}"]
        while queue:
            name = queue.pop()
            if name not in reached and name != "nanovllm":
                reached.add(name)
                queue += graph[name]
        assert not reached & direct, f"{module} reaches torch through {sorted(reached & direct)}"


def _imported_packages(module: str) -> set[str]:
    file = PACKAGE.parent / Path(*module.split("."))
    # A module's data may lie in a folder of its name.
    path = file / "__init__.py" if (file / "__init__.py").exists() else file.with_suffix(".py")
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
