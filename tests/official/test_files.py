"""Official files: what they hold is read exactly, and nothing in them can run, hang or exhaust
memory."""

import os
import pickle
import struct
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relay_jax.errors import UserError
from relay_jax.official.files import OfficialFile, read_official
from tests.official import torch_writer as tw
from tests.official.hostile_files import (
    ARGUMENTS,
    ARRAYS,
    HOSTILE,
    TRAINED,
    beside,
    net,
    state,
    write,
)
from tests.official.torch_writer import Call, Global, Raw, Storages

_events: list[str] | None = None


def _watch(event: str, _: tuple) -> None:
    if _events is not None and event in (
        "exec",
        "compile",
        "os.system",
        "subprocess.Popen",
        "pickle.find_class",
        "import",
        "os.exec",
        "os.posix_spawn",
        "open",
    ):
        _events.append(event)


@pytest.fixture(scope="module", autouse=True)
def watched() -> None:
    sys.addaudithook(_watch)


@pytest.fixture
def events() -> Iterator[list[str]]:
    """Audit events while the test asks for them: whatever a file could do shows up here."""
    global _events
    _events = []
    yield _events
    _events = None


def assert_params(params: dict[str, np.ndarray] | None, expected: dict[str, np.ndarray]) -> None:
    assert params is not None and list(params) == list(expected)
    for name, value in expected.items():
        assert params[name].dtype == np.float32 and params[name].shape == value.shape
        np.testing.assert_array_equal(params[name], value, err_msg=name)


# What files hold


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_are_read_exactly(tmp_path: Path, zipped: bool) -> None:
    official = read_official(
        write(tmp_path, zipped, state).rename(tmp_path / "any.name"), optimizer=True
    )
    assert official.images_seen == 10240 and official.ema and official.net
    assert official.ema.class_name == "EDMPrecond" and official.ema.arguments == ARGUMENTS
    assert_params(official.ema.params, ARRAYS)
    assert_params(official.net.params, {k: 2 * v for k, v in ARRAYS.items()})
    assert_params(official.exp_avg, {k: ARRAYS[k] + 1 for k in TRAINED})
    assert_params(official.exp_avg_sq, {k: ARRAYS[k] + 2 for k in TRAINED})
    assert not official.ema.params["model.map.weight"].flags.writeable


def test_only_what_is_asked_for_is_read(tmp_path: Path) -> None:
    path = write(tmp_path, True, state)
    assert read_official(path).exp_avg is None
    only = read_official(path, networks=("net",))
    assert only.ema is None and only.net is not None
    plain = read_official(write(tmp_path, False, lambda s: {"ema": net(s), "loss_fn": None}))
    assert plain.net is None and plain.images_seen is None


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("<f2", 1e-3), ("<f8", 0.0), ("bf16", 1e-2)])
def test_other_precisions_become_float32(
    tmp_path: Path, zipped: bool, dtype: str, tolerance: float
) -> None:
    network = read_official(write(tmp_path, zipped, lambda s: {"ema": net(s, dtype=dtype)})).ema
    assert network is not None
    for name, value in ARRAYS.items():
        assert network.params[name].dtype == np.float32
        np.testing.assert_allclose(network.params[name], value, rtol=tolerance)


@pytest.mark.parametrize("zipped", [True, False])
def test_windows_of_storages(tmp_path: Path, zipped: bool) -> None:
    base = np.arange(24, dtype=np.float32)

    def build(s: Storages) -> Any:
        shared = s.storage(base.tobytes(), "<f4")
        windows = {
            "model.a.weight": s.window(shared, 0, (3, 4), (1, 3)),
            "model.b.weight": s.window(shared, 12, (2, 3), (6, 2)),
            "model.c.weight": s.window(shared, 23, (), ()),
            "model.d.weight": s.window(shared, 24, (0, 3), (3, 1)),
            "model.e.weight": s.tensor(np.zeros((0, 2))),
        }
        return {"ema": tw.network(windows, ARGUMENTS)}

    network = read_official(write(tmp_path, zipped, build)).ema
    assert network is not None
    np.testing.assert_array_equal(network.params["model.a.weight"], base[:12].reshape(4, 3).T)
    np.testing.assert_array_equal(
        network.params["model.b.weight"], base[12:].reshape(2, 6)[:, :6:2]
    )
    assert network.params["model.c.weight"] == 23 and network.params["model.d.weight"].shape == (
        0,
        3,
    )


def test_a_network_without_preconditioning_and_buffers_outside_the_state(tmp_path: Path) -> None:
    def build(s: Storages) -> Any:
        inner = tw.module_state(
            {"w": tw.parameter(s.tensor(np.ones(2)))},
            {"kept": s.tensor(np.zeros(1)), "hidden": s.tensor(np.zeros(1))},
            {},
            _non_persistent_buffers_set=Call(Global("__builtin__", "set"), (["hidden"],)),
        )
        return {"ema": tw.persistent("DhariwalUNet", inner)}

    network = read_official(write(tmp_path, True, build)).ema
    assert network is not None and list(network.params) == ["model.w", "model.kept"]


@pytest.mark.parametrize("package", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpy_numbers_among_the_arguments(tmp_path: Path, package: str) -> None:
    dtype = Call(
        Global("numpy", "dtype"), ("f8", False, True), (3, "<", None, None, None, -1, -1, 0)
    )
    text = struct.pack("<d", 0.1).decode("latin1")

    def build(s: Storages) -> Any:
        scalars = {
            "a": Call(Global(package, "scalar"), (dtype, struct.pack("<d", 0.1))),
            "b": Call(
                Global(package, "scalar"),
                (dtype, Call(Global("_codecs", "encode"), (text, "latin1"))),
            ),
        }
        return {"ema": tw.network({"model.w": s.tensor(np.ones(2))}, scalars)}

    network = read_official(write(tmp_path, True, build)).ema
    assert network is not None and network.arguments == {"a": 0.1, "b": 0.1}


# What must be refused


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", HOSTILE)
def test_refused_with_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, events: list[str]
) -> None:
    make, says = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path)
    before, begin = sorted(tmp_path.rglob("*")), time.monotonic()
    if name != "too many objects":  # tracing would take ten seconds
        tracemalloc.start()
    del events[:]
    try:
        with pytest.raises(UserError) as refused:
            read_official(path, optimizer=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    happened = set(events)
    assert happened <= {"open"}, happened
    message = str(refused.value)
    assert says in message and "\n" not in message and len(message) < 400, message
    assert path.name in message
    assert sorted(tmp_path.rglob("*")) == before
    assert time.monotonic() - begin < 20 and peak < 300e6


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(UserError, match="not a file"):
        read_official(tmp_path / "pipe.pt")


@pytest.mark.parametrize(
    "code",
    [
        b")" + pickle.TUPLE1 * 300_000,
        b"]" * 300_000 + b"a" * 299_999,
        (b"}" + tw.emit("a")) * 100_000 + b"}" + b"s" * 100_000,
    ],
)
def test_deep_nesting_is_only_data(tmp_path: Path, code: bytes) -> None:
    official = read_official(beside(Raw(code))(tmp_path))
    assert official.ema is not None


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    for zipped in (True, False):
        path = write(
            tmp_path, zipped, lambda s: {"ema": net(s, {"model.w": np.ones(3, np.float32)})}
        )
        whole = path.read_bytes()
        for length in range(0, len(whole), 7):
            path.write_bytes(whole[:length])
            with pytest.raises(UserError):
                read_official(path)


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for zipped in (True, False):
        path = write(
            tmp_path, zipped, lambda s: {"ema": net(s, {"model.w": np.ones(3, np.float32)})}
        )
        whole = np.frombuffer(path.read_bytes(), np.uint8)
        for _ in range(300):
            damaged = whole.copy()
            damaged[rng.integers(0, len(whole), rng.integers(1, 4))] = rng.integers(0, 256)
            path.write_bytes(damaged.tobytes())
            try:
                assert isinstance(read_official(path), OfficialFile)
            except UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize(("dtype", "bound"), [("<f4", 0.1), ("<f2", 2.1)])
@pytest.mark.parametrize("zipped", [True, False])
def test_memory_is_in_proportion_to_the_file(
    tmp_path: Path, zipped: bool, dtype: str, bound: float
) -> None:
    """float32 is not copied at all; half precision once, into arrays of twice the size."""
    big = {f"model.w{i}": np.full((1024, 1024), i, np.float32) for i in range(10)}
    path = write(tmp_path, zipped, lambda s: {"ema": net(s, big, dtype=dtype)})
    tracemalloc.start()
    try:
        network = read_official(path).ema
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert network is not None and all(
        (network.params[f"model.w{i}"] == i).all() for i in range(10)
    )
    assert peak < bound * path.stat().st_size, peak / path.stat().st_size
