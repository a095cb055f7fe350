"""Who imports whom, which modules exist, and how long they are."""

import ast
from pathlib import Path

import pytest

import relay_jax

PACKAGE = Path(relay_jax.__file__).parent
CONFIGS = PACKAGE.parent / "configs"
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at whatever depth of its code."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_module_imports_torch_or_tensorflow(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "tensorflow"}
