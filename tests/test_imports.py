"""Who imports whom, which modules exist, and how long they are."""

import ast
from pathlib import Path

import pytest

import relay_jax

PACKAGE = Path(relay_jax.__file__).parent
CONFIGS = PACKAGE.parent / "configs"
LEAVES = ("diffusion", "models", "data")
LOWER = (*LEAVES, "checkpoint", "cost", "cpu_devices", "environment", "sharding", "logs", "distributed")
UPPER = ("training", "sampling", "evaluation", "tools")
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


def part_of(path: Path) -> str:
    """Package or module below relay_jax: diffusion, main, config ..."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def parts_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("relay_jax.")}


def each(parts: tuple[str, ...]) -> pytest.MarkDecorator:
    chosen = [path for path in MODULES if part_of(path) in parts]
    assert {part_of(path) for path in chosen} == set(parts)
    return pytest.mark.parametrize("path", chosen, ids=lambda path: str(path.relative_to(PACKAGE)))


def test_the_rules_below_speak_of_every_module() -> None:
    assert {part_of(path) for path in MODULES} == {*LOWER, *UPPER, "config", "main", "__init__"}


@each(LEAVES)
def test_leaves_import_nothing_else_of_the_package(path: Path) -> None:
    assert parts_imported(path) <= {part_of(path)}


@each(LOWER)
def test_lower_layers_import_no_verb_no_config_and_no_command_line(path: Path) -> None:
    assert parts_imported(path) <= set(LOWER)


@each(("config",))
def test_config_imports_the_leaves_alone(path: Path) -> None:
    assert parts_imported(path) <= set(LEAVES)


@each(UPPER)
def test_nothing_imports_the_command_line(path: Path) -> None:
    assert parts_imported(path) <= {*LOWER, *UPPER, "config"}


@each(("diffusion",))
def test_diffusion_is_jax_numpy_and_scipy_alone(path: Path) -> None:
    other = {name.split(".")[0] for name in imports(path)} - {"jax", "numpy", "scipy", "relay_jax"}
    assert other <= {"math", "dataclasses", "typing", "collections", "functools"}


@each(("data",))
def test_data_knows_neither_jax_nor_flax(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"jax", "flax", "optax"}


@each((*LOWER, *UPPER, "config", "main"))
def test_no_module_imports_torch_or_tensorflow(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "tensorflow"}


def test_only_the_outermost_functions_see_a_configdict() -> None:
    seeing = {str(path.relative_to(PACKAGE)) for path in MODULES if "ml_collections.ConfigDict" in imports(path)}
    assert seeing <= {"main.py", "config.py", *(f"{part}/verb.py" for part in UPPER)}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.name)
def test_configurations_import_ml_collections_and_the_default_alone(path: Path) -> None:
    allowed = {"ml_collections.ConfigDict"} | (set() if path.name == "default.py" else {"configs.default"})
    assert imports(path) <= allowed


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_are_short_and_named_for_what_they_hold(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")
