"""Images that are not squares, from the configuration to the pictures."""

import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

import relay_jax as rx
from examples.new_network import Transformer
from relay_jax.config import settings_of
from relay_jax.data.images import center_crop_resize, to_float
from relay_jax.data.loader import read
from relay_jax.data.npz import NpzImages
from relay_jax.data.packed import PackedDataset
from relay_jax.data.prepare import prepare
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.diffusion.block_noise import block_noise_power
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.report import notes_on_shape
from relay_jax.models.unet import UNet
from relay_jax.planning.cost import forward_flops
from relay_jax.planning.plan import PlanSettings, plan
from relay_jax.plots.neighbours import neighbours, neighbours_figure, reduce
from relay_jax.plots.spectra import frequencies, square_bands
from relay_jax.resolution import as_resolution, pixels_text, reduced, smaller
from relay_jax.runtime.sharding import make_mesh
from relay_jax.sampling.chain import Chain
from relay_jax.sampling.pixels import to_uint8
from tests.conftest import command_line, run_main, tiny_relay

LOW, HIGH = (8, 12), (32, 48)


def oblong_relay() -> ConfigDict:
    """8x12 -> 32x48 pixels: a level and a half-sized one with attention, and the transformer."""
    config = tiny_relay()
    base, relay = config.stages.base, config.stages.relay
    base.resolution, relay.resolution, relay.process.patch = LOW, HIGH, 4
    base.model = dict(
        kind="examples.new_network:Transformer", width=16, depth=1, heads=2, dtype="float32"
    )
    relay.model.update(multipliers=(1, 1), attention=(16,))
    for stage in (base, relay):
        stage.train.update(images=32, batch=16)
        stage.sample.num_steps = 4
    config.dataset.size = 64
    config.evaluate.update(samples=8, class_check=False)
    return config


def run(*arguments: str) -> None:
    with command_line(*arguments):
        run_main()


def test_one_size_is_written_in_one_way() -> None:
    assert [as_resolution(size) for size in (8, (8, 8), [8, 12])] == [8, 8, (8, 12)]
    for wrong in (0, 8.0, True, "8", (8,), (8, 12, 3), (8, -1), (8, 2.0), None, 2**60):
        with pytest.raises(ValueError, match="resolution must be a positive whole number, or"):
            as_resolution(wrong)  # type: ignore[arg-type]
    assert reduced((8, 12), 4) == (2, 3) and reduced(8, 4) == 2
    assert smaller((8, 11), (8, 12)) and not smaller((9, 12), (8, 12)) and not smaller(12, (8, 12))
    assert pixels_text(8, (8, 12)) == "8 and 8x12 px (height x width)"
    assert pixels_text(8, 16) == "8 and 16 px"


# From an image to the network


def test_an_image_is_cropped_to_the_aspect_and_resized() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (32, 64, 3), np.uint8)
    # 8 of 64 columns on each side are beyond the aspect of 2 to 3.
    cropped = Image.fromarray(image[:, 8:56])
    expected = np.asarray(
        cropped.resize((24, 16), Image.Resampling.BOX).resize((12, 8), Image.Resampling.BOX)
    )
    np.testing.assert_array_equal(center_crop_resize(image, (8, 12)), expected)
    turned = center_crop_resize(image.swapaxes(0, 1), (12, 8))
    difference = turned.swapaxes(0, 1).astype(int) - expected
    assert np.abs(difference).max() <= 2  # halves are rounded up after each axis
    for height, width in ((7, 5), (1, 900), (900, 1), (33, 47), (8, 12)):
        picture = rng.integers(0, 256, (height, width, 3), np.uint8)
        for size in ((8, 12), (12, 8), (1, 64)):
            assert center_crop_resize(picture, size).shape == (*size, 3), (height, width, size)
    strip = np.zeros((2, 30_000, 3), np.uint8)
    strip[:, 15_000:] = 255
    halves = center_crop_resize(strip, (8, 12))
    assert halves[:, :4].max() == 0 and halves[:, 8:].min() == 255  # the edge is bicubic


def test_an_oblong_set_comes_through_all_sources_with_the_same_pixels(tmp_path: Path) -> None:
    source = SyntheticShapes(HIGH, 24, 3)
    images, labels = read(source, range(24), HIGH)
    assert images.shape == (24, *HIGH, 3)
    assert source.fingerprint() != SyntheticShapes(HIGH[::-1], 24, 3).fingerprint()
    # The texture is invisible at the size of the first stage, as in squares.
    low = read(source, range(24), LOW)[0].astype(float)
    fine = images.astype(float) - low.repeat(4, axis=1).repeat(4, axis=2)
    assert np.abs(fine).max() > 80
    np.savez(tmp_path / "set.npz", images, labels.astype(np.int64))
    npz = NpzImages(tmp_path / "set.npz")
    assert npz.resolution == HIGH
    for _ in range(2):  # the second call finds all of it
        prepare(npz, [HIGH, LOW], tmp_path / "packed", description={"source": "npz"}, threads=1)
    packed = PackedDataset(tmp_path / "packed", HIGH)
    assert (tmp_path / "packed" / "8x12").is_dir()
    for size in (LOW, HIGH):
        for each in (npz, packed):
            pixels, classes = read(each, range(24), size)
            np.testing.assert_array_equal(pixels, read(source, range(24), size)[0])
            np.testing.assert_array_equal(classes, labels)
    with pytest.raises(rx.UserError, match="packed at 8x12, 32x48 px, not at 12x8"):
        packed.at((12, 8))


def test_the_unet_of_an_oblong_is_that_of_a_square_on_another_image() -> None:
    """Convolutions and attention know no size: only the names of the parts tell."""
    fields = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(4,), head_width=8)
    square, oblong = UNet(resolution=8, **fields), UNet(resolution=(8, 12), **fields)
    rng = np.random.default_rng(0)
    x, c = rng.normal(size=(2, 8, 12, 3)).astype("f"), rng.normal(size=2).astype("f")
    shapes = jax.eval_shape(lambda: square.init(jax.random.key(0), x[:, :, :8], c))
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape, scale=0.2).astype("f"), shapes)
    renamed = {
        name.replace("8x8", "8x12").replace("4x4", "4x6"): value
        for name, value in params["params"].items()
    }
    np.testing.assert_array_equal(
        jax.jit(oblong.apply)({"params": renamed}, x, c), jax.jit(square.apply)(params, x, c)
    )


# Mathematics of whole images


def test_spectra_of_oblongs_follow_from_those_of_squares() -> None:
    # The power of block noise is a product of one factor along each axis, (4) of block_noise.py.
    lines = [np.sqrt(np.diag(block_noise_power(size, 4))) for size in (8, 12)]
    np.testing.assert_allclose(block_noise_power((8, 12), 4), np.outer(*lines), atol=1e-12)
    # A wave along the height of (8, 12) has the wavelength of 1.5 times the index along the width.
    f = frequencies((8, 12))
    np.testing.assert_allclose(f[2, 0], f[0, 3])
    np.testing.assert_allclose(f.T, frequencies((12, 8)) * 12 / 8)
    np.testing.assert_array_equal(frequencies((8, 8)), frequencies(8))
    bands = square_bands((8, 12))
    assert bands.count.sum() == 96 and bands.label[2, 0] != bands.label[0, 3]
    image = np.random.default_rng(0).normal(size=(1, 64, 96, 3))
    np.testing.assert_allclose(
        reduce(image, 32), image.reshape(1, 32, 2, 32, 3, 3).mean((2, 4)), atol=1e-6
    )


def test_nearest_images_of_oblongs_are_found() -> None:
    source = SyntheticShapes(HIGH, 32, 0)
    samples = read(source, [5, 17], HIGH)[0]
    samples[0, :2] = 0
    nothing = dict(mirrored=False, features={}, each=lambda _: None)
    (result,) = neighbours(samples, source, range(32), 2, **nothing)  # type: ignore[arg-type]
    assert result.positions[:, 0].tolist() == [5, 17] and result.distances[1, 0] < 1e-6
    figure = neighbours_figure([result], samples, [samples[:, None]], ["a", "b"], "")
    assert figure.get_figheight() < 1.5 * 2 + 1.2


# Refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base.resolution": (8, 10)}, "model.patch 4 does not divide 8x10 pixels"),
        ({"relay.resolution": (32, 46)}, "an image of 32 x 46 pixels is not divisible into patch"),
        ({"relay.resolution": (33, 48)}, "33x48 cannot be halved 1 times"),
        ({"relay.resolution": (32, 32)}, r"32 is not 4 \(patch\) times the 8x12 of stage base"),
        ({"relay.resolution": (48, 32)}, r"48x32 is not 4 \(patch\) times the 8x12 of stage base"),
        ({"relay.model.attention": (24,)}, r"asks for level 24, but the levels are \[32, 16\]"),
        (
            {"relay.train.augment": 0.1, "relay.model.num_augment": 9},
            "train.augment needs squares, not 32x48; use 0",
        ),
        ({"relay.resolution": (32, 48, 3)}, r"whole number, or \(height, width\), not \(32, 48"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_in_one_line(
    changes: dict[str, object], message: str
) -> None:
    config = oblong_relay()
    config.stages.base.model.patch = 4
    config.update_from_flattened_dict({f"stages.{key}": value for key, value in changes.items()})
    with pytest.raises(rx.UserError, match=message) as error:
        settings_of(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_a_network_that_sees_squares_says_so() -> None:
    def extractor(side: int) -> FeatureExtractor:
        return FeatureExtractor(
            name="net", identity={}, outputs=("pool",), batch=1, compute=lambda _: {}, side=side
        )

    assert notes_on_shape((8, 12), extractor(0)) == notes_on_shape(8, extractor(299)) == []
    (note,) = notes_on_shape((8, 12), extractor(299))
    assert "net needs squares: images of 8x12 px were stretched to 299 x 299" in note


# Whole relays


def test_published_sizes_plan_on_shapes(tmp_path: Path) -> None:
    config = oblong_relay()
    config.stages.base.resolution, config.stages.relay.resolution = (64, 96), (256, 384)
    config.stages.relay.model.attention = ()
    report = plan(settings_of(config), None, PlanSettings(hardware=["v5e"]), tmp_path)
    assert [stage["resolution"] for stage in report["stages"]] == [(64, 96), (256, 384)]
    config.stages.base.resolution, config.stages.relay.resolution = (96, 64), (384, 256)
    upright = forward_flops(settings_of(config).stages[1])
    assert upright == report["stages"][1]["forward_flops"] > 256 * 384 * 2 * 27 * 8


def test_configurations_keep_a_square_as_a_number() -> None:
    config = tiny_relay()
    config.stages.base.resolution, config.stages.relay.resolution = (8, 8), [16, 16]
    assert settings_of(config).plain == settings_of(tiny_relay()).plain
    assert json.dumps(settings_of(oblong_relay()).plain["stages"]["relay"]["resolution"]) == (
        "[32, 48]"
    )
    arguments = ["--config.stages.base.resolution=(8, 12)", "--config.stages.relay.resolution=32"]
    with command_line("--config=demo", *arguments):
        stages = flags.FLAGS["config"].value.stages
        assert (stages.base.resolution, stages.relay.resolution) == ((8, 12), 32)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the oblong relay."""
    folder = tmp_path_factory.mktemp("oblong")
    (folder / "config.py").write_text(
        "from tests.test_oblong import oblong_relay\n\n\ndef get_config(_=''):\n"
        "    return oblong_relay()\n"
    )
    run(f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}")
    return folder / "run"


def png(folder: Path, seed: int) -> np.ndarray:
    return np.asarray(Image.open(folder / "000000" / f"{seed:06d}.png"))


def test_an_oblong_relay_trains_and_samples(workdir: Path, tmp_path: Path) -> None:
    report = json.loads((workdir / "report.json").read_text())
    assert math.isfinite(report["scores"]["FD-random-conv"])
    assert report["samples"]["resolution"] == [32, 48]
    relay = rx.load(workdir)
    images = relay.sample(range(4))
    assert images["base"].shape == (4, *LOW, 3) and images["relay"].shape == (4, *HIGH, 3)
    assert isinstance(relay.stage("base").network, Transformer)
    out = tmp_path / "images"
    run(f"--workdir={workdir}", "--mode=sample", "--seeds=0-3", f"--out={out}")
    for seed in range(4):
        np.testing.assert_array_equal(png(out, seed), to_uint8(images["relay"])[seed])
    low, high = tmp_path / "low", tmp_path / "high"
    run(f"--workdir={workdir}", "--mode=sample", "--seeds=0-1", "--stage=base", f"--out={low}")
    continued = ["--stage=relay", f"--low_res={low}", "--format=npz", f"--out={high}"]
    run(f"--workdir={workdir}", "--mode=sample", "--seeds=0-1", *continued)
    # From the 8 bits of the files, clipped: what the library makes of the same.
    chain = Chain([relay.stage("relay")], relay.params, make_mesh(), relay.batch)
    low_res = to_float(to_uint8(images["base"][:2]))
    expected = chain.images([0, 1], np.arange(2), low_res)["relay"]
    written = np.load(high / "samples_2x32x48x3.npz")["arr_0"]
    np.testing.assert_array_equal(written, to_uint8(expected))
    scores = tmp_path / "scores"
    compared = [f"--images={out}", "--reference_images=16", f"--out={scores}"]
    run(f"--workdir={workdir}", "--mode=evaluate", *compared)
    assert json.loads((scores / "report.json").read_text())["reference"]["images"] == 16


def test_an_oblong_relay_has_all_pictures(workdir: Path, tmp_path: Path) -> None:
    pictures = "data,snr,handoff,filmstrip,grid"
    arguments = [f"--plot={pictures}", "--plot_images=16", "--seeds=0-1", f"--out={tmp_path}"]
    run(f"--workdir={workdir}", "--mode=plot", *arguments)
    for name in pictures.split(","):
        picture = np.asarray(Image.open(tmp_path / f"{name}.png"))
        assert picture.std() > 5 and json.loads((tmp_path / f"{name}.json").read_text())
    # Three panels of two images of 96 x 144 pixels, shown in rows of four columns.
    assert np.asarray(Image.open(tmp_path / "grid.png")).shape[1] > 3 * 4 * 144
