"""Eight virtual CPU devices, a compilation cache that outlives the run, and the smallest whole
relay."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# The first halves the compilation, which dominates. On a busy machine eight devices on two cores
# may wait for each other longer than XLA's 40 seconds, after which it ends the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=200",
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
from absl import flags
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from relay_jax.configs import demo
from relay_jax.errors import DataError
from relay_jax.runtime import counting

gc.set_threshold(100_000, 50, 100)  # as relay_jax.main does


def tiny_relay() -> ConfigDict:
    """The demo's relay with networks of one level: what every test of the loops trains and
    samples."""
    config = demo.get_config("smoke")
    for stage in (config.stages.base, config.stages.relay):
        stage.model.update(channels=8, head_width=8, multipliers=(1,), attention=())
        stage.train.update(images=96, batch=16)
    config.stages.relay.resolution = 16
    config.stages.relay.process.patch = 2
    config.dataset.update(size=64, threads=1)
    config.checkpoint.every_images = 48
    config.log.update(every_steps=2, grid_every_images=0)
    config.evaluate.pictures = False
    return config


@pytest.fixture(autouse=True)
def leaves_the_command_line() -> Iterator[None]:
    """ml_collections reads sys.argv: what one test leaves there, another one would parse."""
    before = list(sys.argv)
    yield
    assert sys.argv == before


@pytest.fixture
def config() -> ConfigDict:
    return tiny_relay()


def mesh_of(count: int) -> Mesh:
    """A data-parallel mesh of the first `count` devices."""
    if jax.device_count() < count:
        pytest.skip(f"needs {count} devices")
    return jax.make_mesh(
        (count, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:count]
    )


@contextmanager
def command_line(*arguments: str) -> Iterator[None]:
    """Parses arguments as `python -m relay_jax.main` does; afterwards the flags are as they
    were."""
    from relay_jax import commandline  # late: most tests need no command line

    values, argv = flags.FLAGS.flag_values_dict(), sys.argv
    sys.argv = ["main", *arguments]  # where ml_collections looks for overrides
    try:
        commandline.parse_flags(sys.argv)
        yield
    finally:
        sys.argv = argv
        for name in list(flags.FLAGS):
            if name.startswith(("config.", "weights.")):
                delattr(flags.FLAGS, name)
        for flag in flags.FLAGS.get_flags_for_module(commandline):
            flag.value = values.get(flag.name)
            flag.present = 0


def run_main() -> None:
    """Runs the verb of the parsed command line in this process, on the devices that it has."""
    from relay_jax import main

    main.run(flags.FLAGS["config"].value)


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `tiny_relay`, made once for each process of the tests; read only."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.py").write_text(
        "from tests.conftest import tiny_relay\n\n\ndef get_config(_=''):\n"
        "    return tiny_relay()\n"
    )
    with command_line(f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}"):
        run_main()
    return folder / "run"


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float | None]]:
    """What is counted from now on (runtime/counting.py): its name -> [total, how much was done].

    Finished ones alone.
    """
    ended: dict[str, list[float | None]] = {}

    class Task:
        def __init__(self, what: str, total: float | None, unit: str) -> None:
            self.what, self.numbers = f"{what}, {unit}", [total, 0.0]

        def update(self, done: float) -> None:
            self.numbers[1] = round(done, 9)

        def close(self) -> None:
            ended[self.what] = self.numbers

    monkeypatch.setattr(counting, "_show", None)
    counting.show_by(Task)
    return ended


def error_of(action: Callable[[], object]) -> str:
    """The one line of the DataError that the action must raise."""
    with pytest.raises(DataError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    return message


def content(out: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {
        str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()
    }
