"""Who imports whom, which modules exist, and how long they are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import relay_jax

PACKAGE = Path(relay_jax.__file__).parent
ROOT = PACKAGE.parent
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each part may import of the package beside itself, from below to above. A part is a folder
# or a module of the top level.
BELOW: dict[str, set[str]] = {"errors": set(), "configs": set(), "__init__": set()}
BELOW["resolution"] = set()
BELOW["runtime"] = {"errors"}
BELOW["diffusion"] = BELOW["models"] = {"errors", "resolution"}
BELOW["data"] = {"errors", "resolution", "runtime.files", "runtime.counting"}
LEAVES = {"errors", "resolution", "runtime", "diffusion", "models", "data"}
BELOW["stage"] = LEAVES
BELOW["values"] = {"errors", "models"}
BELOW["config"] = LEAVES | {"stage", "configs", "values"}
BELOW["workdir"] = LEAVES | {"stage", "config"}
BELOW["presets"] = LEAVES | {"stage", "config", "configs"}
CORE = LEAVES | {"stage", "config", "workdir", "presets", "values"}
BELOW["sampling"] = CORE
BELOW["evaluation"] = BELOW["plots"] = CORE | {"sampling", "evaluation", "plots"}
BELOW["training"] = CORE | {"sampling", "evaluation", "plots"}
BELOW["weights"] = CORE | {"sampling"}
BELOW["relay"] = CORE | {"sampling", "evaluation", "plots", "training", "weights"}
BELOW["official"] = BELOW["planning"] = CORE | {"sampling", "evaluation", "plots", "training"}
EVERYTHING = BELOW["official"] | {"official", "planning", "relay", "weights"}
BELOW["commandline"] = EVERYTHING
BELOW["main"] = EVERYTHING | {"commandline"}
BELOW["tools"] = {"official"}  # the old name of a command

# The exceptions: published weights of feature networks and statistics are read by the reader of
# official files.
EXCEPTIONS = {
    "evaluation/network.py": {"official.pickle", "official.torch_files"},
    "evaluation/published.py": {"official.pickle"},
}


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at whatever depth of its code."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def name_of(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


def modules_imported(path: Path) -> set[str]:
    """Modules of the package that a file imports: `runtime.files`, `stage`."""
    modules = set()
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "relay_jax" or len(parts) < 2:
            continue
        candidate = PACKAGE.joinpath(*parts[1:3]).with_suffix(".py")
        folder = PACKAGE / parts[1]
        modules.add(".".join(parts[1:3]) if candidate.exists() and folder.is_dir() else parts[1])
    return modules


def test_the_rules_speak_of_every_part() -> None:
    assert {part_of(path) for path in MODULES} == set(BELOW)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_downwards_alone(path: Path) -> None:
    part = part_of(path)
    allowed = BELOW[part] | {part} | EXCEPTIONS.get(name_of(path), set())
    lazily_public = name_of(path) == "__init__.py"  # its imports are for type checkers
    for module in modules_imported(path):
        assert lazily_public or module in allowed or module.split(".")[0] in allowed, module


def test_no_two_parts_import_each_other() -> None:
    edges: dict[str, set[str]] = {}
    for path in MODULES:
        if name_of(path) != "__init__.py" and name_of(path) not in EXCEPTIONS:
            others = {m.split(".")[0] for m in modules_imported(path)} - {part_of(path)}
            edges.setdefault(part_of(path), set()).update(others)
    finished: set[str] = set()
    while edges:
        free = {part for part, others in edges.items() if others <= finished}
        assert free, f"a cycle among {sorted(edges)}"
        finished |= free
        edges = {part: others for part, others in edges.items() if part not in free}


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) == "diffusion"], ids=name_of)
def test_diffusion_is_jax_numpy_scipy_and_chex_alone(path: Path) -> None:
    allowed = {"jax", "numpy", "scipy", "chex", "relay_jax"}
    other = {name.split(".")[0] for name in imports(path)} - allowed
    assert other <= {"math", "dataclasses", "typing", "collections", "functools", "enum"}


@pytest.mark.parametrize("path", [p for p in MODULES if part_of(p) == "data"], ids=name_of)
def test_data_knows_neither_jax_nor_flax(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"jax", "flax", "optax"}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_imports_torch_or_tensorflow(path: Path) -> None:
    assert not {name.split(".")[0] for name in imports(path)} & {"torch", "tensorflow"}


def test_only_the_outermost_modules_see_a_configdict() -> None:
    seeing = {name_of(p) for p in MODULES if "ml_collections.ConfigDict" in imports(p)}
    assert seeing <= {"main.py", "config.py", "workdir.py", "relay.py"}


def test_the_unet_is_named_in_few_files_outside_of_models_and_official() -> None:
    naming = {
        name_of(path)
        for path in MODULES
        if part_of(path) not in ("models", "official") and "UNet" in path.read_text()
    }
    assert len(naming) <= 4, naming


def test_few_places_ask_which_process_or_sampler_they_have() -> None:
    kinds = ("EdmProcess", "RelayProcess", "Heun")
    asking = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            asks = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"
            if asks and any(kind in ast.unparse(node.args[1]) for kind in kinds):
                asking.append(name_of(path))
    assert len(asking) <= 3, asking


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configurations_import_ml_collections_and_the_default_alone(path: Path) -> None:
    default = set() if path.name == "default.py" else {"relay_jax.configs.default"}
    assert imports(path) <= {"ml_collections.ConfigDict", "ml_collections.FieldReference"} | default


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_are_short_and_named_for_what_they_hold(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    assert path.stem not in ("utils", "util", "helpers", "common", "misc")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_functions_take_at_most_seven_parameters(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [a.arg for a in arguments if a.arg not in ("self", "cls")]
            assert len(names) <= 7, f"{node.name} takes {len(names)}"


def test_importing_the_package_loads_no_jax() -> None:
    code = "import sys, relay_jax; assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_every_public_name_is_there_with_a_docstring() -> None:
    for name in relay_jax.__all__:
        assert isinstance(getattr(relay_jax, name), dict) or getattr(relay_jax, name).__doc__, name
