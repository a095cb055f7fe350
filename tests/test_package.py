"""The installed package stands alone: configurations by name, nothing beside relay_jax."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, in a folder of its own."""
    folder = tmp_path_factory.mktemp("wheel")
    # Built from a copy: setuptools leaves a build folder where it works.
    source = folder / "source"
    for name in ("relay_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", f"--wheel-dir={folder}"]
    subprocess.run([*pip, str(source)], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run(installed: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed), "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_nothing_but_the_package_is_installed(installed: Path) -> None:
    names = {path.name for path in installed.iterdir()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"relay_jax"}
    assert (installed / "relay_jax/plots/page.html").exists()
    entry_points = next(installed.glob("*.dist-info/entry_points.txt")).read_text()
    assert "relay-jax = relay_jax.main:console" in entry_points


def test_a_configuration_is_found_by_name_away_from_the_checkout(
    installed: Path, tmp_path: Path
) -> None:
    output = run(
        installed, tmp_path, "-m", "relay_jax.main", "--config=demo", "--mode=plan",
        "--hardware=v5e",
    )  # fmt: skip
    assert "stage relay: 32 px" in output
    code = "import relay_jax as rx; print(rx.__file__, len(rx.build('cifar10:smoke').stages))"
    place, count = run(installed, tmp_path, "-c", code).split()
    assert Path(place).is_relative_to(installed) and count == "2"
