"""What docs/extending.md promises: each example alone, and all of them in one run from training to
report, through the command line and the library."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

import relay_jax as rx
from examples import new_stage
from examples.new_metric import colour_features, energy, energy_distance
from examples.new_network import Transformer
from examples.new_process import CauchyRelay, cauchy_matrix
from examples.new_sampler import Euler
from examples.new_source import NpyImages
from relay_jax.config import build
from relay_jax.configs import demo
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.diffusion.process import EdmProcess, RelayProcess
from relay_jax.diffusion.sampler import seeded_noise
from relay_jax.errors import DataError
from relay_jax.evaluation import metrics
from relay_jax.models.network import describe
from relay_jax.sampling.chain import sample_stage
from relay_jax.sampling.pixels import to_uint8
from tests.conftest import command_line, run_main
from tests.examples.render import code_cells, executed, pictures_of, read_notebook

# A whole run with nothing of the built-in parts but the loops around them.
CONFIG = """
from tests.conftest import tiny_relay


def get_config():
    config = tiny_relay()
    for stage in config.stages.values():
        stage.model = dict(
            kind="examples.new_network:Transformer", width=16, depth=1, heads=2, dtype="float32"
        )
        stage.sample.kind = "examples.new_sampler:Euler"
    config.stages.relay.process.kind = "examples.new_process:CauchyRelay"
    config.dataset.update(source="examples.new_source:NpyImages", path={path!r})
    config.evaluate.update(samples=8, features="examples.new_metric:colour_features")
    return config
"""


def run(*arguments: str) -> None:
    with command_line(*arguments):
        run_main()


def images(count: int = 64, resolution: int = 16) -> tuple[np.ndarray, np.ndarray]:
    source = SyntheticShapes(resolution, count, seed=0)
    pixels, labels = zip(*(source[i] for i in range(count)), strict=True)
    return np.stack(pixels), np.array(labels)


def npy_folder(folder: Path) -> Path:
    folder.mkdir()
    pixels, labels = images()
    np.save(folder / "images.npy", pixels)
    np.save(folder / "labels.npy", labels)
    return folder


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of all examples together, stopped in between and continued."""
    top = tmp_path_factory.mktemp("examples")
    config = top / "config.py"
    config.write_text(CONFIG.format(path=str(npy_folder(top / "data"))))
    arguments = [f"--config={config}", f"--workdir={top / 'run'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(metrics.METRICS, "energy", energy_distance)  # the one line of a metric
        for name in ("base", "relay"):
            run(*arguments, f"--stage={name}", f"--config.stages.{name}.train.images=48")
        run(*arguments)
    return top / "run"


# All together


def test_a_run_of_examples_alone_trains_continues_and_reports(workdir: Path) -> None:
    for name in ("base", "relay"):
        lines = (workdir / name / "metrics.jsonl").read_text().splitlines()
        seen = [json.loads(line)["images"] for line in lines]
        assert seen == [32, 48, 64, 96], name
    report = json.loads((workdir / "report.json").read_text())
    features = "examples.new_metric:colour_features"
    assert {f"FD-{features}", f"energy-{features}"} <= set(report["scores"])
    assert report["training"]["base"]["images"] == 96


def test_checkpoints_and_records_name_the_examples(workdir: Path) -> None:
    relay = rx.load(workdir)
    network = relay.notes["base"]["network"]
    assert network["kind"] == "examples.new_network:Transformer" and network["width"] == 16
    stage = relay.stage("relay").describe()
    assert stage["process"]["kind"] == "examples.new_process:CauchyRelay"
    assert stage["sampler"]["kind"] == "examples.new_sampler:Euler"


def test_a_continued_training_has_the_bits_of_one_that_never_stopped(
    workdir: Path, tmp_path: Path
) -> None:
    run(f"--config={workdir.parent / 'config.py'}", f"--workdir={tmp_path}", "--stage=base")
    base = rx.load(workdir).params["base"]
    other = rx.load({"base": tmp_path / "base"}, f"{workdir.parent / 'config.py'}").params["base"]
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), base, other))


def test_the_library_gives_the_bits_that_the_command_line_writes(
    workdir: Path, tmp_path: Path
) -> None:
    run(f"--workdir={workdir}", "--mode=sample", "--seeds=3-6", f"--out={tmp_path}")
    written = [np.asarray(Image.open(file)) for file in sorted(tmp_path.rglob("*.png"))]
    pictures = rx.load(workdir).sample(range(3, 7))["relay"]
    np.testing.assert_array_equal(to_uint8(pictures), np.stack(written))
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["stages"]["base"]["network"]["depth"] == 1


def test_another_sampler_is_named_for_a_trained_run(workdir: Path, tmp_path: Path) -> None:
    kind = "--config.stages.relay.sample.kind=heun"
    run(f"--workdir={workdir}", "--mode=sample", "--seeds=0-1", f"--out={tmp_path}", kind)
    written = [np.asarray(Image.open(file)) for file in sorted(tmp_path.rglob("*.png"))]
    relay = rx.load(workdir)
    euler = relay.stage("relay").sampler
    heun = rx.Heun(fresh_noise=0.2, **asdict(euler))  # the configuration's fresh noise
    pictures = relay.replace("relay", sampler=heun).sample(range(2))["relay"]
    np.testing.assert_array_equal(to_uint8(pictures), np.stack(written))
    assert np.abs(pictures - relay.sample(range(2))["relay"]).max() > 1e-3


def test_the_other_verbs_work_on_a_run_of_examples(
    workdir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(f"--workdir={workdir}", "--mode=evaluate", "--seeds=0-7", f"--out={tmp_path / 'scores'}")
    scores = json.loads((tmp_path / "scores" / "report.json").read_text())["scores"]
    assert np.isfinite(list(scores.values())).all()
    page = (tmp_path / "scores" / "report.html").read_text()
    assert page.count("<img") == 2 and all(name in page for name in scores)
    run(f"--workdir={workdir}", "--mode=plan", "--devices=1", "--hardware=H100")
    plan = json.loads((workdir / "plan.json").read_text())["stages"]
    # Euler's calls are its levels, and the plan knows it from the sampler alone.
    assert [s["sampling"]["calls"] for s in plan] == [
        len(stage.sampler.levels()) - 1 for stage in rx.load(workdir).stages
    ]
    run(f"--workdir={workdir}", "--mode=plot", "--plot=snr,filmstrip", f"--out={tmp_path}")
    assert (tmp_path / "snr.png").exists() and (tmp_path / "filmstrip.png").exists()


def test_a_kind_can_be_named_over_the_keys_of_another() -> None:
    names = {
        "model": "examples.new_network:Transformer",
        "sample": "examples.new_sampler:Euler",
        "process": "examples.new_process:CauchyRelay",
    }
    kinds = [f"--config.stages.relay.{part}.kind={name}" for part, name in names.items()]
    with command_line("--config=demo:smoke", *kinds):
        stage = build(flags.FLAGS["config"].value)[1]
    parts = stage.network, stage.sampler, stage.process
    assert [type(part) for part in parts] == [Transformer, Euler, CauchyRelay]
    assert stage.sampler.num_steps == 8 and stage.process.patch == 4


def test_a_short_name_in_the_dict_does_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(rx.SAMPLERS, "euler", Euler)
    monkeypatch.setitem(rx.NETWORKS, "transformer", Transformer)
    kinds = [
        "--config.stages.base.sample.kind=euler",
        "--config.stages.base.model.kind=transformer",
    ]
    with command_line("--config=demo:smoke", *kinds):
        stage = build(flags.FLAGS["config"].value)[0]
    assert stage.describe()["sampler"]["kind"] == "euler"
    assert stage.describe()["network"]["kind"] == "transformer"


def test_a_key_of_no_kind_and_one_of_a_derived_kind_are_refused() -> None:
    for section, key in (("sample", "num_stepz"), ("process", "patch"), ("model", "widht")):
        config = demo.get_config("smoke")
        config.stages.base.model.kind = "examples.new_network:Transformer"
        config.stages.base[section][key] = 4
        with pytest.raises(rx.UserError, match=key):
            build(config)


# The notebook


def test_the_cells_of_the_notebook_run_in_their_order(workdir: Path) -> None:
    notebook = executed(read_notebook(), str(workdir))
    assert len(pictures_of(notebook)) >= 5
    text = json.dumps([cell["outputs"] for cell in code_cells(notebook)])
    assert "Transformer" in text and "label_dropout" in text


def test_the_notebook_is_one_and_holds_its_pictures() -> None:
    notebook = read_notebook()
    assert notebook["nbformat"] == 4
    assert all(png.startswith(b"\x89PNG") for png in pictures_of(notebook))
    assert len(pictures_of(notebook)) >= 5


# The sampler


def drawn(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("process", [EdmProcess(), RelayProcess(patch=2)], ids=["edm", "relay"])
def test_one_step_of_euler_is_the_first_call_of_heun(process: EdmProcess) -> None:
    handoff = {"handoff_sigma": 0.9} if process.starts_from_images else {}
    euler = Euler(num_steps=6, **handoff)
    heun = rx.Heun(num_steps=6, **handoff)
    np.testing.assert_array_equal(euler.levels(), heun.levels())
    noise_fn = seeded_noise(jax.random.split(jax.random.key(0), 2), (8, 8, 3))
    seen: list[np.ndarray] = []

    def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), x, ordered=True)
        return jnp.tanh(x) / (1 + sigma)

    states = []
    for sampler in (euler, heun):
        seen.clear()
        sampler(denoise, drawn((2, 8, 8, 3)), process, noise_fn)
        jax.effects_barrier()
        assert len(seen) == len(sampler.call_sigmas())
        states.append(seen[:2])
    # The second call sees the first step; Heun's third would see the correction.
    np.testing.assert_allclose(states[0][1], states[1][1], rtol=1e-5, atol=1e-6)


def test_euler_ends_at_the_image_of_a_perfect_denoiser() -> None:
    image = drawn((2, 8, 8, 3))
    for process in (EdmProcess(), RelayProcess(patch=2), CauchyRelay(patch=2)):
        euler = Euler(num_steps=5, handoff_sigma=0.9 if process.starts_from_images else np.inf)
        samples = euler(lambda x, sigma: image, drawn(image.shape, 1), process, None, True)
        np.testing.assert_allclose(samples.final, image, atol=1e-6)
        assert samples.states.shape == (len(euler.levels()) - 1, *image.shape)


# The process


def test_the_blur_of_the_process_keeps_its_three_promises() -> None:
    process, x, y = CauchyRelay(patch=4, min_scale=0.0), drawn((2, 8, 8, 3)), drawn((2, 8, 8, 3), 1)
    np.testing.assert_allclose(process.blur(x, jnp.zeros(2)), x, atol=1e-6)
    means = x.reshape(2, 2, 4, 2, 4, 3).mean(axis=(2, 4), keepdims=True)
    patches = jnp.broadcast_to(means, (2, 2, 4, 2, 4, 3)).reshape(x.shape)
    np.testing.assert_allclose(process.blur(x, jnp.float32(1e4)), patches, atol=1e-6)
    s = jnp.array([0.3, 2.0])
    np.testing.assert_allclose(
        process.blur(x + 2 * y, s), process.blur(x, s) + 2 * process.blur(y, s), atol=1e-5
    )


def test_the_blur_attenuates_a_frequency_exponentially() -> None:
    # A cosine of the patch is an eigenvector: exp(-f s) of it is left.
    wave = np.cos(np.pi * 3 * (np.arange(8) + 0.5) / 8)
    blurred = cauchy_matrix(jnp.float32(0.7), 8) @ wave
    np.testing.assert_allclose(blurred, np.exp(-np.pi * 3 / 8 * 0.7) * wave, atol=1e-6)


# The network


def test_the_transformer_starts_at_zero_and_uses_all_of_its_inputs() -> None:
    network = Transformer(resolution=8, width=16, depth=1, heads=2, num_classes=3, num_augment=2)
    inputs = (drawn((2, 8, 8, 3)), drawn((2,)), jnp.eye(3)[:2], jnp.eye(2))
    apply = jax.jit(network.apply)
    params = jax.jit(network.init)(jax.random.key(0), *inputs)
    assert not np.any(apply(params, *inputs))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.1 * rng.normal(size=p.shape).astype("f"), params)
    output = apply(params, *inputs)
    for place in range(4):
        other = [2 * x if i == place else x for i, x in enumerate(inputs)]
        assert np.abs(apply(params, *other) - output).max() > 1e-3
    half = network.clone(dtype=jnp.bfloat16, remat=True)
    assert jax.eval_shape(half.apply, params, *inputs).dtype == jnp.float32
    assert describe(half)["dtype"] == "bfloat16"


def test_a_patch_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.patch"):
        Transformer(resolution=9).check()


# The source


def test_the_source_reads_arrays_and_refuses_others(tmp_path: Path) -> None:
    source = NpyImages(str(npy_folder(tmp_path / "data")))
    pixels, labels = images()
    assert len(source) == 64 and source.num_classes == 8 and source.resolution == 16
    np.testing.assert_array_equal(source[5][0], pixels[5])
    assert source[5][1] == labels[5]
    before = source.fingerprint()
    np.save(tmp_path / "data" / "images.npy", pixels[:, ::-1])
    assert NpyImages(str(tmp_path / "data")).fingerprint() != before
    np.save(tmp_path / "data" / "images.npy", pixels[..., 0])
    for folder in (tmp_path / "data", tmp_path):
        with pytest.raises(DataError, match=r"images\.npy"):
            NpyImages(str(folder))


# The metric


def test_the_energy_distance_is_unbiased_and_sees_a_difference() -> None:
    rng = np.random.default_rng(0)
    same = [energy(*rng.normal(size=(2, 20, 3))) for _ in range(200)]
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same)) and min(same) < 0
    a, b = rng.normal(size=(2, 30, 3))
    assert energy(a, b + 1) > max(same)
    # Between |0 - 3|, |0 - 1|, |1 - 3|, |1 - 1|; within 1 and 2.
    assert energy(np.array([[0.0], [1.0]]), np.array([[3.0], [1.0]])) == 2 * 6 / 4 - 1 - 2
    with pytest.raises(ValueError, match="compared"):
        energy(a, a[:, :2])


def test_colour_features_do_not_depend_on_the_other_images() -> None:
    pixels, _ = images(8)
    features = colour_features(pixels)
    assert features.shape == (8, 6) and features.dtype == np.float32
    np.testing.assert_array_equal(colour_features(pixels[3:4])[0], features[3])


# The stage


def test_a_third_stage_continues_the_images_of_the_second() -> None:
    low_res, seeds = None, jax.ShapeDtypeStruct((2,), jnp.uint32)
    for stage, side in zip(build(new_stage.get_config("smoke")), (8, 32, 64), strict=True):
        sampled = partial(sample_stage, stage, classes=None)
        low_res = jax.eval_shape(sampled, stage.shapes(), seeds, low_res=low_res).final
        assert low_res.shape == (2, side, side, 3)
