"""Checkpoints: round trips, falling back from damage, what is kept, another placement."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from relay_jax.errors import StorageError, UserError
from relay_jax.models.network import init_params, shapes_of
from relay_jax.models.unet import UNet
from relay_jax.runtime import checksums
from relay_jax.runtime.checkpoint import Checkpoints, has_checkpoint, load_ema, verify, verify_all
from relay_jax.runtime.files import digest
from tests.conftest import command_line, mesh_of, run_main
from tests.damage import damage_checkpoint


class Carried(NamedTuple):
    params: dict
    opt_state: optax.OptState
    count: jax.Array


META = {"images": 640, "data": {"next_batch": 10, "x_flip": True}, "seconds": 1.5}


def ema_of(step: int) -> dict:
    return {
        "block": {
            "kernel": jnp.arange(12.0).reshape(3, 4) + step,
            "bias": jnp.full(4, -step, jnp.float32),
        }
    }


def train_of(step: int) -> dict:
    params = ema_of(step + 100)
    return {
        "state": Carried(params, optax.adam(1e-3).init(params), jnp.int32(step)),
        "step": jnp.int32(step),
    }


def placed(tree: object) -> object:
    """Everything on the first device."""
    return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)


def restore(
    folder: Path, items: tuple[str, ...] = ("ema", "train"), read_only: bool = False
) -> tuple[int, dict] | None:
    trees = {"ema": ema_of(0), "train": train_of(0)}
    like = {name: jax.eval_shape(lambda tree: tree, trees[name]) for name in items}
    with Checkpoints(folder, read_only=read_only) as checkpoints:
        return checkpoints.restore(like, placed(like))


def saved(folder: Path, steps: tuple[int, ...] = (10, 20, 30), keep: int = 3) -> Path:
    with Checkpoints(folder, keep) as checkpoints:
        for step in steps:
            checkpoints.save(
                step, ema=ema_of(step), train=train_of(step), meta={**META, "images": 64 * step}
            )
    return folder


def damage(folder: Path, step: int, item: str = "ema") -> None:
    (folder / str(step) / item / "manifest.ocdbt").unlink()


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    step, items = restore(saved(tmp_path, (10,)))
    assert step == 10 and items["meta"] == META
    chex.assert_trees_all_equal(items["ema"], ema_of(10))
    chex.assert_trees_all_equal(items["train"], train_of(10))
    chex.assert_trees_all_equal_dtypes(items["train"], train_of(10))
    assert type(items["train"]["state"]) is Carried
    assert jax.tree.structure(items["train"]) == jax.tree.structure(train_of(10))


def test_the_average_can_be_read_alone_even_where_the_rest_is_damaged(tmp_path: Path) -> None:
    damage(saved(tmp_path, (10,)), 10, "train")
    step, items = restore(tmp_path, ("ema",), read_only=True)
    assert step == 10 and set(items) == {"ema", "meta"}
    chex.assert_trees_all_equal(items["ema"], ema_of(10))


def test_the_newest_is_restored_and_the_oldest_are_dropped(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20, 30, 40), keep=2)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [40, 30]
    step, items = restore(tmp_path)
    assert step == 40 and items["meta"]["images"] == 64 * 40
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"30", "40"}


def test_chosen_steps_stay_for_ever_beside_the_newest(tmp_path: Path) -> None:
    for steps in ((10, 20, 30, 40, 50), (60, 70)):  # in two starts of a run
        with Checkpoints(tmp_path, keep=2, keep_always=lambda step: step % 20 == 0) as checkpoints:
            for step in steps:
                checkpoints.save(step, ema=ema_of(step), train=train_of(step), meta=META)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [70, 60, 40, 20]


def test_a_step_that_is_there_is_not_saved_again(tmp_path: Path) -> None:
    saved(tmp_path, (10,))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(10, ema=ema_of(77), train=train_of(77), meta=META)
    chex.assert_trees_all_equal(restore(tmp_path)[1]["ema"], ema_of(10))


def test_a_damaged_newest_is_passed_over_removed_and_can_be_saved_again(tmp_path: Path) -> None:
    damage(saved(tmp_path), 30)
    step, items = restore(tmp_path)
    assert step == 20
    chex.assert_trees_all_equal(items["ema"], ema_of(20))
    assert not (tmp_path / "30").exists()
    saved(tmp_path, (30,))
    step, items = restore(tmp_path)
    assert step == 30
    chex.assert_trees_all_equal(items["train"], train_of(30))


@pytest.mark.parametrize("read_only", [True, False])
def test_reading_the_average_passes_over_a_damaged_newest_and_leaves_it(
    read_only: bool, tmp_path: Path
) -> None:
    damage(saved(tmp_path), 30)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert restore(tmp_path, ("ema",), read_only)[0] == 20
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_other_damage_is_passed_over_too(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "30" / "train" / "_METADATA").write_text('{"tree')
    (tmp_path / "20" / "meta" / "metadata").write_text("{")
    assert restore(tmp_path)[0] == 10


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: len(path.read_bytes()) // 2])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no index": lambda step: (step / "train" / "manifest.ocdbt").unlink(),
    "half an index": lambda step: cut(step / "ema" / "manifest.ocdbt"),
    "no list of parts": lambda step: [path.unlink() for path in (step / "ema" / "d").iterdir()],
    "half the notes": lambda step: cut(step / "meta" / "metadata"),
    "half the names": lambda step: cut(step / "train" / "_METADATA"),
    "no item": lambda step: shutil.rmtree(step / "ema"),
    "nothing": lambda step: [shutil.rmtree(path) for path in step.iterdir() if path.is_dir()],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_plain_damage_is_seen(kind: str, tmp_path: Path) -> None:
    saved(tmp_path, (10, 20))
    DAMAGE[kind](tmp_path / "20")
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.is_whole(10) and not checkpoints.is_whole(20)
    assert restore(tmp_path)[0] == 10, (
        "what cannot be read was said to be whole, or the other way round"
    )


# Checksums


def test_damage_to_any_file_is_seen_or_changes_nothing(tmp_path: Path) -> None:
    silent: list[Path] = []
    results = damage_checkpoint(tmp_path, 63, 0, silent.append)
    assert results["silent"] == 0, silent
    assert results["harmless"] + results["detected"] == 63 and results["detected"] > 15
    assert results["restored as damaged, but whole for `verify`"] == 0


def test_one_changed_weight_is_seen_even_where_all_files_can_be_read(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20))
    # The same run with one other bit: every file of Orbax is right.
    other = tmp_path / "other"
    ema = ema_of(20)
    ema["block"]["bias"] = ema["block"]["bias"].at[2].add(1e-5)
    with Checkpoints(other) as checkpoints:
        checkpoints.save(20, ema=ema, train=train_of(20), meta={**META, "images": 64 * 20})
    shutil.rmtree(tmp_path / "20" / "ema")
    shutil.copytree(other / "20" / "ema", tmp_path / "20" / "ema")
    assert verify_in(tmp_path) == {20: "array ema/block.bias differs from its checksum", 10: ""}
    step, items = restore(tmp_path, ("ema",), read_only=True)
    assert step == 10
    chex.assert_trees_all_equal(items["ema"], ema_of(10))


def verify_in(folder: Path) -> dict[int, str]:
    """`verify` of a stage whose checkpoints lie in a folder of any name."""
    stage = folder / "as a stage"
    stage.mkdir(exist_ok=True)
    (stage / "checkpoints").symlink_to(folder)
    return verify(stage)


def test_changed_notes_are_seen(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20))
    path = tmp_path / "20" / "meta" / "metadata"
    path.write_text(path.read_text().replace("1280", "1281"))
    assert restore(tmp_path, (), read_only=True)[0] == 10
    assert restore(tmp_path)[0] == 10


def test_a_checkpoint_of_an_earlier_version_is_read_and_says_once_that_it_is_not_checked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, (10, 20))
    for step in (10, 20):
        shutil.rmtree(tmp_path / str(step) / "checksums")
    for _ in range(2):
        step, items = restore(tmp_path, read_only=True)
        assert step == 20
        chex.assert_trees_all_equal(items["train"], train_of(20))
    assert caplog.text.count("written without checksums") == 1
    assert all("cannot be checked" in text for text in verify_in(tmp_path).values())


@pytest.mark.parametrize("meta", ["[]", "3", "null", "{}", '{"seconds": "long", "data": {}}'])
def test_malformed_notes_count_as_unreadable_also_without_checksums(
    meta: str, tmp_path: Path
) -> None:
    saved(tmp_path, (10, 20))
    shutil.rmtree(tmp_path / "20" / "checksums")
    (tmp_path / "20" / "meta" / "metadata").write_text(meta)
    trees = {"ema": ema_of(0)}
    like = {"ema": jax.eval_shape(lambda: trees["ema"])}
    notes = {"seconds": (int, float), "data": (dict,)}
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.restore(like, placed(like), notes=notes)[0] == 10


def test_all_checkpoints_of_a_run_are_verified(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, relay = tmp_path / "base", tmp_path / "relay"
    for stage in (base, relay):
        saved(stage / "checkpoints", (10, 20))
    weights = [f"--weights.{folder.name}={folder}" for folder in (base, relay)]
    with command_line("--config=configs/demo.py:smoke", "--mode=verify", *weights):
        run_main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": whole")]
    assert len(lines) == 4 and f"{relay / 'checkpoints' / '20'}: whole" in lines
    notes = base / "checkpoints" / "10" / "meta" / "metadata"
    notes.write_text(notes.read_text().replace("640", "641"))
    with pytest.raises(UserError, match=r"1 of 4 checkpoints .*base/checkpoints/10; remove"):
        verify_all([base, relay])
    verify_all([base / "checkpoints" / "20"])
    with pytest.raises(UserError, match="no checkpoint in"):
        verify_all([tmp_path])


def test_a_split_array_is_checked_by_its_parts(tmp_path: Path) -> None:
    value = jnp.arange(24.0).reshape(4, 6)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, ema={"x": value}, train={"step": jnp.int32(1)}, meta={})
    path = tmp_path / "1" / "checksums" / "process_0.json"
    # As two processes would have written it, each of which had two columns
    # or four.
    record = json.loads(path.read_text())
    del record["sha256"]
    split = {
        place: checksums._hash("x", (4, 6), place, np.asarray(value)[:, columns])
        for place, columns in (("0:4,0:2", slice(0, 2)), ("0:4,2:6", slice(2, 6)))
    }
    for process, place in enumerate(split):
        record["items"]["ema"]["x"] = {place: split[place]}
        record["processes"] = 2
        path.with_name(f"process_{process}.json").write_text(
            json.dumps(record | {"sha256": digest(record)})
        )
    whole = checksums.Checksums.read(tmp_path / "1")
    whole.check("ema", {"x": value})
    whole.check_files()
    with pytest.raises(ValueError, match="array ema/x differs"):
        whole.check("ema", {"x": value.at[3, 5].set(0)})
    path.with_name("process_1.json").unlink()
    assert restore_fails(tmp_path, value)


def restore_fails(folder: Path, value: jax.Array) -> bool:
    """Whether a checkpoint of one array is refused."""
    like = {"ema": {"x": jax.eval_shape(lambda: value)}}
    with Checkpoints(folder, read_only=True) as checkpoints:
        try:
            checkpoints.restore(like, placed(like))
        except UserError:
            return True
    return False


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A stage's folder with the checkpoints 10 and 20, of which 20 is damaged; do not write
    into it."""
    folder = tmp_path_factory.mktemp("stage")
    network = UNet(resolution=4, channels=8, multipliers=(1,), blocks=1, attention=(), head_width=8)
    params = jax.jit(lambda key: init_params(network, key))(jax.random.key(0))
    with Checkpoints(folder / "checkpoints", 3) as checkpoints:
        for step in (10, 20):
            ema = jax.tree.map(lambda x, step=step: x + step, params)
            checkpoints.save(
                step, ema=ema, train={"step": jnp.int32(step)}, meta={**META, "images": 64 * step}
            )
    damage(folder / "checkpoints", 20)
    return folder, shapes_of(network)


def test_a_named_checkpoint_is_read_with_its_step(stage: tuple[Path, dict]) -> None:
    folder, shapes = stage
    for named in (
        folder,
        folder / "checkpoints" / "10",
    ):  # the newest is damaged, so both are the same
        params, notes = load_ema(named, shapes, mesh_of(1))
        assert notes == {**META, "images": 640, "step": 10}
        np.testing.assert_array_equal(params["out_norm"]["scale"], np.full(8, 11.0))


@pytest.mark.parametrize(
    ("step", "says"),
    [
        ("20", "cannot be read; there are [20, 10]"),
        ("30", "no checkpoint 30 in"),
        ("30", "there are [20, 10]"),
    ],
)
def test_a_named_checkpoint_has_no_substitute(
    stage: tuple[Path, dict], step: str, says: str
) -> None:
    folder, shapes = stage
    with pytest.raises(UserError) as error:
        load_ema(folder / "checkpoints" / step, shapes, mesh_of(1))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_whether_there_is_a_checkpoint_to_read(stage: tuple[Path, dict], tmp_path: Path) -> None:
    folder, _ = stage
    assert has_checkpoint(folder) and has_checkpoint(folder / "checkpoints" / "10")
    assert not has_checkpoint(folder / "checkpoints" / "30") and not has_checkpoint(tmp_path)


def test_what_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise ValueError("Error writing\n" + 300 * "x" + "\nNo space left on device")

    with pytest.raises(StorageError) as error, Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", full)
        checkpoints.save(10, ema=ema_of(10), train=train_of(10), meta=META)
    expected = f"checkpoints cannot be written in {tmp_path}: No space left on device"
    assert str(error.value) == expected


def test_when_all_are_damaged_the_folder_is_named_in_one_line_and_kept(tmp_path: Path) -> None:
    saved(tmp_path, (10, 20))
    for step in (10, 20):
        damage(tmp_path, step)
    with pytest.raises(UserError, match=r"\[20, 10\]") as error:
        restore(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "10").exists() and (tmp_path / "20").exists()


@pytest.mark.parametrize("read_only", [True, False])
def test_without_checkpoints_there_is_nothing_to_restore(read_only: bool, tmp_path: Path) -> None:
    folder = tmp_path / "none"
    assert restore(folder, read_only=read_only) is None
    assert folder.exists() != read_only
    assert restore(folder, read_only=read_only) is None


def test_a_save_that_was_killed_is_no_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, (10,))
    (tmp_path / "20.orbax-checkpoint-tmp" / "ema").mkdir(parents=True)
    with Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [10]
    assert restore(saved(tmp_path, (20,)))[0] == 20


def test_the_note_of_a_checkpoint_is_plain_json(tmp_path: Path) -> None:
    saved(tmp_path, (10,))
    assert json.loads((tmp_path / "10" / "meta" / "metadata").read_text()) == META


def test_a_checkpoint_of_eight_devices_is_restored_on_one_and_the_other_way(tmp_path: Path) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    mesh: Mesh = jax.make_mesh(
        (8,), ("fsdp",), axis_types=(AxisType.Auto,), devices=jax.devices()[:8]
    )
    split, one = (
        NamedSharding(mesh, PartitionSpec(None, "fsdp")),
        jax.sharding.SingleDeviceSharding(jax.devices()[0]),
    )
    value = np.arange(3 * 16, dtype=np.float32).reshape(3, 16)
    like = {"ema": {"kernel": jax.ShapeDtypeStruct(value.shape, value.dtype)}}
    for name, first, second in (("many", split, one), ("single", one, split)):
        with Checkpoints(tmp_path / name) as checkpoints:
            ema = {"kernel": jax.device_put(value, first)}
            checkpoints.save(1, ema=ema, train={"step": jax.device_put(jnp.int32(1), one)}, meta={})
        with Checkpoints(tmp_path / name, read_only=True) as checkpoints:
            _, items = checkpoints.restore(like, {"ema": {"kernel": second}})
        assert items["ema"]["kernel"].sharding.is_equivalent_to(second, 2)
        np.testing.assert_array_equal(items["ema"]["kernel"], value)
