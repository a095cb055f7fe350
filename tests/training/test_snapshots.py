"""Averages and snapshots of a real training: their values, resume, other widths, damage; sampled
by name, and by a guide."""

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import relay_jax as rx
from relay_jax.config import build, settings_of
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import UserError
from relay_jax.models.averages import Profile, profile_weights
from relay_jax.models.network import describe
from relay_jax.planning.cost import forward_flops, stage_flops
from relay_jax.runtime.checkpoint import Checkpoints, load_ema
from relay_jax.runtime.files import read_json
from relay_jax.sampling.folder import read_images
from relay_jax.sampling.record import read_record
from relay_jax.training import loop
from relay_jax.training.snapshots import reconstruct
from relay_jax.workdir import claim_workdir
from tests.conftest import command_line, content, mesh_of, run_main, tiny_relay

STEPS, BATCH = 6, 16
HALFLIFE = 64.0  # that of the tiny relay


def averaging_relay() -> ConfigDict:
    """The tiny relay, of which everything is kept after each step of the first stage."""
    config = tiny_relay()
    config.stages.base.train.ema = (0.1, 0.2, HALFLIFE)
    config.checkpoint.update(
        every_images=BATCH, keep_every_images=BATCH, snapshot_every_images=BATCH
    )
    return config


STAGE = build(averaging_relay())[0]


def command(folder: Path, *arguments: str) -> None:
    with command_line(f"--workdir={folder / 'run'}", *arguments):
        run_main()


def train(run: Path) -> None:
    """Trains the first stage; one device, which is the fastest to compile for."""
    settings = settings_of(averaging_relay())
    claim_workdir(settings.plain, run, create=True)
    loop.train_stage(STAGE, SyntheticShapes(8, 64, 0), mesh_of(1), run / "base", settings)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six uninterrupted steps of the first stage, and the average 0.15 of them; read only."""
    folder = tmp_path_factory.mktemp("averages")
    (folder / "config.py").write_text(
        "from tests.training.test_snapshots import averaging_relay\n\n\n"
        "def get_config(_=''):\n    return averaging_relay()\n"
    )
    train(folder / "run")
    command(folder, "--mode=average", "--ema=0.15", "--stage=base")
    return folder


def copy_of(folder: Path, to: Path) -> Path:
    shutil.copytree(folder / "run", to / "run")
    return to / "run" / "base"


def items(place: Path) -> dict:
    """All arrays of a checkpoint, by item, on the host."""
    with Checkpoints(place.parent, read_only=True) as checkpoints:
        tree = checkpoints._manager.restore(int(place.name))
    return {name: jax.tree.map(np.asarray, tree[name]) for name in tree if name != "checksums"}


def average_by_hand(base: Path, width: float) -> dict:
    """Of the parameters after each step, by the profile in closed form, in float64."""
    weights = profile_weights(Profile(STEPS, width))
    params = [items(base / "checkpoints" / str(n + 1))["train"]["params"] for n in range(STEPS)]
    return jax.tree.map(
        lambda *leaves: sum(w * np.float64(x) for w, x in zip(weights, leaves, strict=True)),
        *params,
    )


def test_averages_are_those_of_the_parameters_after_each_step(folder: Path) -> None:
    base = folder / "run" / "base"
    last = items(base / "checkpoints" / str(STEPS))
    assert set(last) == {"ema", "ema_0.1", "ema_0.2", "ema_64", "train", "meta"}
    for width in (0.1, 0.2):
        want = average_by_hand(base, width)
        chex.assert_trees_all_close(last[f"ema_{width}"], want, rtol=1e-5, atol=1e-7)
    chex.assert_trees_all_close(last["ema_64"], last["ema"], rtol=1e-6, atol=1e-8)
    assert np.any(last["ema_0.1"]["out_conv"]["kernel"] != last["ema"]["out_conv"]["kernel"])
    snapshots = sorted(int(path.name) for path in (base / "snapshots/checkpoints").glob("[0-9]*"))
    assert snapshots == list(range(1, STEPS + 1))
    kept = items(base / "snapshots" / "checkpoints" / str(STEPS))
    assert set(kept) == {"ema_0.1", "ema_0.2", "meta"}
    chex.assert_trees_all_equal(kept["ema_0.1"], last["ema_0.1"])


def test_another_width_is_reconstructed_from_the_snapshots(folder: Path) -> None:
    """Two snapshots after each step span every profile: what is left is float32."""
    base = folder / "run" / "base"
    params, notes = load_ema(base / "averages" / "0.15", STAGE.shapes(), mesh_of(1))
    want = average_by_hand(base, 0.15)
    chex.assert_trees_all_close(jax.device_get(params), want, rtol=2e-5, atol=1e-6)
    assert notes["average"]["width"] == 0.15 and notes["average"]["error"] < 1e-6
    assert notes["step"] == STEPS and notes["images"] == STEPS * BATCH


def test_an_interrupted_training_has_the_same_averages_and_snapshots(
    folder: Path, tmp_path: Path
) -> None:
    """Also where later snapshots of a lost end lie in the way."""
    base = copy_of(folder, tmp_path)
    for step in (4, 5, 6):
        shutil.rmtree(base / "checkpoints" / str(step))
    shutil.rmtree(base / "snapshots" / "checkpoints" / "5")
    for place in (base / "snapshots/checkpoints/6").rglob("ema_0.1/d/*"):
        place.write_bytes(b"of another training")
    train(tmp_path / "run")
    for place in ("checkpoints", "snapshots/checkpoints"):
        for step in range(1, STEPS + 1):
            chex.assert_trees_all_equal(
                *(
                    {k: v for k, v in items(each / place / str(step)).items() if k != "meta"}
                    for each in (base, folder / "run" / "base")
                )
            )


def test_damaged_snapshots_are_seen_and_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = copy_of(folder, tmp_path)
    files = (base / "snapshots/checkpoints/3/ema_0.1").rglob("d/*")
    path = max(files, key=lambda path: path.stat().st_size)
    changed = bytearray(path.read_bytes())
    changed[len(changed) // 2] ^= 1
    path.write_bytes(changed)
    with pytest.raises(UserError, match="1 of 13 checkpoints are damaged"):
        command(tmp_path, "--mode=verify", "--stage=base")
    assert "averages/0.15/checkpoints/6: whole" in capsys.readouterr().out
    line = reconstruct(STAGE, base, "0.05")
    assert "from 10 kept ones" in line and (base / "averages" / "0.05").is_dir()
    with pytest.raises(UserError, match="no whole snapshot of step 3"):
        reconstruct(STAGE, base, "0.05", 3)


def test_samples_are_of_the_average_that_is_named(folder: Path, tmp_path: Path) -> None:
    base, images = folder / "run" / "base", {}
    for name in ("", "0.10", "0.15", "64"):
        out = tmp_path / (name or "plain")
        flags = [f"--ema={name}"] if name else []
        command(folder, "--mode=sample", "--stage=base", "--seeds=0-3", f"--out={out}", *flags)
        images[name] = content(out / "000000")
        record = read_record(out)["stages"]["base"]
        assert record.get("ema", "") == (name and f"{float(name):g}")
        assert ("profile_error" in record["checkpoint"]) == (name == "0.15")
    assert len({json.dumps({k: v.hex() for k, v in i.items()}) for i in images.values()}) >= 3
    relay = rx.load({"base": base}, str(folder / "config.py"), ema=0.1)
    stored = items(base / "checkpoints" / str(STEPS))["ema_0.1"]
    chex.assert_trees_all_equal(jax.device_get(relay.params["base"]), stored)
    with pytest.raises(UserError, match=r"another ema are not loaded.*sampling="):
        relay.replace("base", ema="0.2")


@pytest.mark.parametrize(
    ("ema", "says"),
    [
        ("0.07", r"stage base: no average 0.07 .* there are ema, 0.1, 0.15, 0.2, 64; .*--mode=av"),
        ("fast", "'fast' names no average"),
        ("0.6", "'0.6' names no average"),
    ],
)
def test_averages_that_are_not_there_are_one_line(folder: Path, ema: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        rx.load(folder / "run", sampling={"base": {"ema": ema}})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_an_average_of_half_a_training_is_not_that_of_all(folder: Path, tmp_path: Path) -> None:
    base, config = copy_of(folder, tmp_path), str(folder / "config.py")
    reconstruct(STAGE, base, "0.25", 4)
    with pytest.raises(UserError, match=r"0.25 is of step 4, and there are snapshots up to 6"):
        rx.load({"base": base}, config, ema=0.25)
    relay = rx.load({"base": f"{base}@4"}, config, ema=0.25)
    assert relay.notes["base"]["step"] == 4
    with pytest.raises(UserError, match="no snapshots in"):
        reconstruct(STAGE, tmp_path, "0.25")


# Guides

WEIGHT = 2.5


def guided(folder: Path, **keys: object) -> rx.Relay:
    run = {"base": folder / "run" / "base"}
    keys = {"guide_weight": WEIGHT, **keys}
    return rx.load(run, str(folder / "config.py"), sampling={"base": keys})


@partial(jax.jit, static_argnums=0)
def denoised(stage: rx.Stage, params: dict) -> jax.Array:
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))
    return stage.denoiser(params, jnp.asarray([1, 5]))(x, jnp.float32(0.7))


def test_an_earlier_checkpoint_guides_without_label_dropout(folder: Path, tmp_path: Path) -> None:
    base, relay = folder / "run" / "base", guided(folder, guide="base@3")
    plain, earlier = (
        denoised(STAGE, items(base / "checkpoints" / str(step))["ema"]) for step in (STEPS, 3)
    )
    want = WEIGHT * plain - (WEIGHT - 1) * earlier
    got = denoised(relay.stage("base"), relay.params["base"])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.abs(want - plain).max() > 1e-3, "the checkpoints are alike"
    assert guided(folder, guide="base@3", guide_weight=1).stage("base").guide is None
    # The command line makes the same images, and says by what.
    flags = ["--config.stages.base.sample.guide=base@3", f"--out={tmp_path / 'out'}"]
    flags += [f"--config.stages.base.sample.guide_weight={WEIGHT}", "--seeds=0-1"]
    command(folder, "--mode=sample", "--stage=base", *flags)
    record = read_record(tmp_path / "out")["stages"]["base"]["guide"]
    assert (record["weights"], record["weight"], record["checkpoint"]["step"]) == (
        "base@3",
        WEIGHT,
        3,
    )

    written = read_images(tmp_path / "out", range(2), 8)
    images = relay.sample(range(2))["base"]
    assert np.abs(written - np.clip(images, -1, 1)).max() < 2.1 / 255


def other_weights(folder: Path, **network: object) -> Path:
    """A stage of another network with random weights, as a checkpoint."""
    other = STAGE.network.clone(**network)
    params = jax.jit(lambda key: rx.Stage.init(_with(other), key))(jax.random.key(1))
    meta = {"network": json.loads(json.dumps(describe(other)))}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(7, params, None, meta)
    return folder


def _with(network: object) -> rx.Stage:
    return replace(STAGE, network=network)


def test_a_smaller_network_guides_and_plans_count_it(folder: Path, tmp_path: Path) -> None:
    small = other_weights(tmp_path / "small", channels=4, head_width=4)
    relay = guided(folder, guide=f"{small}@7", guide_interval=(0.0, 1.0))
    stage = relay.stage("base")
    assert stage.guide_network.channels == 4
    seeds = jnp.zeros(2, jnp.uint32)
    images = jax.eval_shape(partial(rx.sample, stage), relay.params["base"], seeds, seeds)
    assert images.shape == (2, 8, 8, 3)
    sigmas = stage.sampler.call_sigmas()
    forward, worse = (forward_flops(_with(n)) for n in (STAGE.network, stage.guide_network))
    inside = int((sigmas <= 1.0).sum())
    assert 0 < inside < len(sigmas) and worse < forward
    assert stage_flops(stage, forward) == len(sigmas) * forward + inside * worse
    preset = relay.with_preset("fast").stage("base")
    assert preset.guide_network == stage.guide_network


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"guide": "base@3", "guidance": 2.0}, "sample.guide and sample.guidance 2.0 at once"),
        (
            {"guide": "base@9"},
            "sample.guide: .* has no checkpoint of step 9; there are",
        ),
        ({"guide": "base"}, "is what it would guide"),
        ({"guide": "nowhere@3"}, "sample.guide: .*nowhere has no checkpoints"),
        ({"guide": "base@3", "guide_weight": 0.5}, "guide_weight must be at least 1"),
        ({"guide": "base@3", "guide_interval": (2.0, 1.0)}, "guide_interval must be two rising"),
        ({"guide": "base@3", "guide_ema": "0.3"}, "names no average"),
        ({"guide": 3}, "sample.guide must be a text"),
    ],
)
def test_guides_that_cannot_be_are_one_line(folder: Path, keys: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as caught:
        guided(folder, **keys)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_guide_of_other_classes_or_another_process_is_refused(
    folder: Path, tmp_path: Path
) -> None:
    other = other_weights(tmp_path / "unconditional", num_classes=0)
    with pytest.raises(UserError, match="has num_classes 0, and the stage 8"):
        guided(folder, guide=str(other))
    base = copy_of(folder, tmp_path)
    config = read_json(base.parent / "config.json")
    config["stages"]["base"]["process"]["sigma_data"] = 0.25
    (base.parent / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"trained with process.sigma_data 0.25, and the stage has"):
        guided(folder, guide=f"{base}@3")
