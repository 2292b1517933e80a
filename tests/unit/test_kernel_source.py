"""The source of kernels: what the oldest supported Triton cannot read."""

import ast
from pathlib import Path

import nanovllm

OPS = Path(nanovllm.__file__).parent / "ops"


def kernels(tree: ast.AST) -> list[ast.FunctionDef]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [node for node in functions if any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)]


def nested_targets(kernel: ast.FunctionDef) -> list[str]:
    """Return the assignments of a kernel that unpack a tuple inside a tuple."""
    assignments = [node for node in ast.walk(kernel) if isinstance(node, ast.Assign)]
    tuples = [(node, target) for node in assignments for target in node.targets if isinstance(target, ast.Tuple)]
    return [ast.unparse(node) for node, target in tuples if any(isinstance(part, ast.Tuple) for part in target.elts)]


def test_no_kernel_unpacks_a_tuple_inside_a_tuple():
    """Triton 3.6 raises TypeError for it when it first hashes the kernel; 3.9 does not."""
    sources = {path: kernels(ast.parse(path.read_text())) for path in OPS.rglob("*.py")}
    assert sum(map(len, sources.values())) > 50
    found = {f"{path}:{kernel.name}": nested_targets(kernel) for path, found in sources.items() for kernel in found}
    assert not {name: lines for name, lines in found.items() if lines}
    assert nested_targets(kernels(ast.parse("@triton.jit\ndef k(x):\n    a, (b, c) = x\n"))[0]) == ["a, (b, c) = x"]
