"""The project's functions against the numbers of the official implementation
(tests/golden/README.md).

Tolerances allow float32 in another order of operations, at least ten times what was measured,
and no more: a slip in a formula (a factor, an index, a constant) is mostly 100 to 100,000 times
as large.
"""

import functools
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import golden_adapter as ours

FOLDER = Path(__file__).parent / "golden"
Array = np.ndarray


@functools.cache
def golden(name: str) -> tuple[dict[str, Array], dict]:
    """Arrays and settings of a file."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    return arrays, json.loads(str(arrays.pop("settings")))


def cases(name: str, prefix: str = "") -> pytest.MarkDecorator:
    names = [case for case in golden(name)[1]["cases"] if case.startswith(prefix)]
    assert names
    return pytest.mark.parametrize("case", names)


def assert_close(got: object, want: Array, tolerance: float, per: str = "file") -> None:
    """Largest difference over largest golden value: of the whole array, of each 'row' (first
    axis), of each 'value'.

    Rows by themselves, so that one of large values cannot hide a wrong one of small values.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    axes = {"file": tuple(range(want.ndim)), "row": tuple(range(1, want.ndim)), "value": ()}[per]
    difference, size = np.abs(got - want).max(axis=axes), np.abs(want).max(axis=axes)
    np.testing.assert_array_less(difference, tolerance * size + 1e-30)  # fails for NaN too


# Transforms.


@pytest.mark.parametrize(
    "key, patch", [("dct_p4", 4), ("dct_p8", 8), ("dct_full", 32), ("idct_p4", 4)]
)
def test_dct(key: str, patch: int) -> None:
    arrays, _ = golden("dct")
    transform = ours.idct if key.startswith("i") else ours.dct
    assert_close(transform(arrays["x"], patch=patch), arrays[key], 1e-5)


@pytest.mark.parametrize("patch", [4, 8])
def test_blur(patch: int) -> None:
    arrays, _ = golden("blur")
    assert_close(
        ours.blur(arrays["x"], arrays["blur_sigmas"], patch=patch), arrays[f"y_up{patch}"], 1e-5
    )


@pytest.mark.parametrize("patch", [2, 4, 8])
@pytest.mark.parametrize("data", ["in", "ce"])
def test_attenuation_on_both_sides_of_full_blur(data: str, patch: int) -> None:
    arrays, settings = golden("blur")
    settings = settings[f"alpha_{data}"]
    got = ours.attenuation(
        arrays["alpha_sigmas"],
        patch=patch,
        cdf_max=settings["prob_length"],
        blur_sigma_max=settings["blur_sigma_max"],
    )
    assert_close(got, arrays[f"alpha_{data}_p{patch}"], 1e-5)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_block_noise(size: int) -> None:
    arrays, _ = golden("noise")
    assert_close(ours.block_noise(arrays["g"], size=size), arrays[f"block_{size}"], 1e-5)


# Losses.


def loss_denoiser(xp: object) -> Callable:
    """The stand-in network behind the golden losses."""
    return lambda x, sigma, labels=None: (
        x / (1 + xp.reshape(sigma, (-1, 1, 1, 1)) ** 2) + 0.1 * xp.tanh(x)
    )


def relay_inputs(case: str) -> tuple[list[Array], dict[str, float], dict[str, Array]]:
    arrays, settings = golden("loss")
    settings = settings["cases"][case]
    scale = settings["block_scale"]
    draws = [
        arrays[k] for k in ("images", "uniform", "gauss1" if scale else "gauss0", "gauss_block")
    ]
    keywords = dict(
        patch=settings["up_scale"],
        cdf_max=settings["prob_length"],
        block_noise_scale=scale,
        blur_sigma_max=settings["blur_sigma_max"],
        sigma_floor=settings.get("truncate_sigma", 0.0075),
    )
    return draws, keywords, arrays


@cases("loss")
def test_relay_corruption(case: str) -> None:
    draws, keywords, arrays = relay_inputs(case)
    got = ours.relay_corrupt(*draws, **keywords)
    assert_close(got["sigma"], arrays[f"{case}_sigma"], 2e-5, per="value")
    assert_close(got["weight"], arrays[f"{case}_weight"], 5e-5, per="value")
    assert_close(got["blur_sigma"], arrays[f"{case}_blur_sigmas"], 1e-5)
    assert_close(got["blurred"], arrays[f"{case}_y_blurred"], 1e-5, per="row")
    assert_close(got["noisy"], arrays[f"{case}_noisy"], 2e-5, per="row")


@cases("loss")
def test_relay_loss(case: str) -> None:
    draws, keywords, arrays = relay_inputs(case)
    assert_close(
        ours.relay_loss(loss_denoiser, *draws, **keywords), arrays[f"{case}_loss"], 2e-4, per="row"
    )


def test_edm_corruption_and_loss() -> None:
    arrays, _ = golden("loss")
    draws = arrays["images"], arrays["normal"], arrays["gauss0"]
    got = ours.edm_corrupt(*draws)
    assert_close(got["sigma"], arrays["edm_sigma"], 2e-5, per="value")
    assert_close(got["weight"], arrays["edm_weight"], 5e-5, per="value")
    assert_close(got["noisy"], arrays["edm_noisy"], 2e-5, per="row")
    assert_close(ours.edm_loss(loss_denoiser, *draws), arrays["edm_loss"], 2e-4, per="row")


# Schedules.


def grid_settings(settings: dict) -> dict[str, float]:
    grid = {k: settings[k] for k in ("num_steps", "sigma_min", "sigma_max", "rho")}
    return grid | (
        {"handoff_sigma": settings["truncation_sigma"]} if settings["sampler"] == "blur" else {}
    )


@cases("schedule")
def test_sampling_grids(case: str) -> None:
    arrays, settings = golden("schedule")
    levels = ours.edm_sigmas if case.startswith("edm") else ours.relay_sigmas
    assert_close(
        levels(**grid_settings(settings["cases"][case])), arrays[f"{case}_t"], 1e-12, per="value"
    )


# Samplers.


def sampler_denoiser(xp: object) -> Callable:
    """The analytic denoiser of the golden runs, [b, h, w, c]: towards the mean image of the
    class, or of no class."""
    arrays, _ = golden("samplers")
    means = np.concatenate([arrays["class_means"], arrays["uncond_mean"][None]]).transpose(
        0, 2, 3, 1
    )

    def denoise(x: object, sigma: object, labels: object = None) -> object:
        sigma = xp.reshape(xp.asarray(sigma, x.dtype), (-1, 1, 1, 1))
        labels = xp.zeros((len(x), len(means) - 1)) if labels is None else labels
        weights = xp.concatenate([labels, 1 - labels.sum(axis=1, keepdims=True)], axis=1)
        mean = (weights[:, :, None, None, None] * means).sum(axis=1)
        return (
            mean + (x - mean) * 0.25 / (0.25 + sigma**2) + 0.05 * sigma / (1 + sigma) * xp.tanh(x)
        )

    return denoise


def recorded_noise(case: str) -> dict[str, Array]:
    """The official draws by purpose and step; 1000, impossible to miss, where the official
    sampler draws nothing."""
    arrays, _ = golden("samplers")
    steps, shape = len(arrays[f"{case}_xcur"]), arrays["draws"].shape[1:]
    purposes = [
        f"{moment}_{kind}"
        for moment in ("initial", "churn", "euler", "heun")
        for kind in ("gauss", "block")
    ]
    noise = {purpose: np.full((steps, *shape), 1000.0, np.float32) for purpose in purposes}
    for name, field in zip(
        arrays[f"{case}_draw_names"], arrays["draws"], strict=False
    ):  # step3:euler:block_base
        step, moment, kind = name.removeprefix("step").split(":")
        noise[f"{moment}_{kind.removesuffix('_base')}"][int(step)] = field
    return {k: v[0] if k.startswith("initial") else v for k, v in noise.items()}


def check_samples(case: str, got: dict[str, Array]) -> None:
    arrays, _ = golden("samplers")
    assert_close(
        got["states"][:, 0], arrays[f"{case}_xcur"], 5e-5, per="row"
    )  # of the first image at every step
    assert_close(got["final"], arrays[f"{case}_final"], 5e-5, per="row")


@cases("samplers", "edm")
def test_first_stage_sampler(case: str) -> None:
    arrays, settings = golden("samplers")
    s = settings["cases"][case]
    check_samples(
        case,
        ours.sample_edm(
            sampler_denoiser,
            arrays["edm_latents"],
            arrays["class_labels"],
            recorded_noise(case),
            **grid_settings(s),
            guidance=s.get("cfg_scale", 1),
            s_churn=s.get("S_churn", 0),
            s_min=s.get("S_min", 0),
            s_max=s.get("S_max", np.inf),
            s_noise=s.get("S_noise", 1),
            sde_scale=s.get("sde_scale", 0),
        ),
    )


@cases("samplers", "blur")
def test_relay_sampler(case: str) -> None:
    arrays, settings = golden("samplers")
    s = settings["cases"][case]
    check_samples(
        case,
        ours.sample_relay(
            sampler_denoiser,
            arrays[f"{case}_lowres"],
            arrays["class_labels"],
            recorded_noise(case),
            **grid_settings(s),
            patch=s["up_scale"],
            cdf_max=s["truncation_t"],
            blur_sigma_max=s["blur_sigma_max"],
            block_noise_scale=s["s_block"],
            fresh_noise=s["s_noise"],
            guidance=s["cfg_scale"],
            s_churn=0,
            s_min=0,
            s_max=np.inf,
            s_noise=1,
        ),
    )


# Network.


def network_config(settings: dict) -> dict:
    return {"label_dim": 0, "augment_dim": 0, "channel_mult_emb": 4} | settings["config"]


def below(arrays: dict[str, Array], prefix: str) -> dict[str, Array]:
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def network_inputs() -> tuple:
    """A class-conditional network with augmentation labels, 24 px, and one attention head of 80
    channels."""
    arrays, settings = golden("unet")
    return (
        below(arrays, "param/"),
        network_config(settings),
        arrays["x"],
        arrays["sigma"],
        arrays["class_labels"],
        arrays["augment_labels"],
    )


def test_unet() -> None:
    arrays, _ = golden("unet")
    got = ours.unet(*network_inputs())
    assert_close(got["F_x"], arrays["F_x"], 3e-5, per="row")
    assert_close(got["D_x"], arrays["D_x"], 3e-5, per="row")


def test_unet_without_class() -> None:
    arrays, _ = golden("unet")
    *inputs, _, augment_labels = network_inputs()
    assert_close(
        ours.unet(*inputs, None, augment_labels)["D_x"], arrays["D_x_nolabel"], 3e-5, per="row"
    )


def test_unet_gradients() -> None:
    arrays, _ = golden("unet")
    expected = below(arrays, "grad/")
    got = ours.unet_grad(*network_inputs(), arrays["G"], list(expected))
    assert_close(got["x"], arrays["grad_x"], 1e-4, per="row")
    for name, want in expected.items():
        assert_close(got[name], want, 1e-4)


# Checkpoints.

EXPECTED = json.loads((FOLDER / "checkpoints.json").read_text())


@pytest.fixture
def unpack(tmp_path: Path) -> Callable[[str], Path]:
    def unpack(name: str) -> Path:
        path = tmp_path / name
        path.write_bytes(lzma.decompress((FOLDER / f"{name}.xz").read_bytes()))
        return path

    return unpack


def assert_same(tensors: dict[str, Array], expected: dict[str, list]) -> None:
    """The same names, shapes and bits; constant resampling filters may be left out."""
    got = {
        name: np.asarray(value)
        for name, value in tensors.items()
        if not name.endswith("resample_filter")
    }
    assert {
        name: [list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()[:16]]
        for name, value in got.items()
    } == expected


@pytest.mark.parametrize(
    "name, same_as",
    [
        ("training-state.pt", "training-state.pt"),
        ("edm_release.pkl", "edm_release.pkl"),
        ("edm_release_objects.pkl", "training-state.pt"),
    ],
)
def test_averaged_weights_of_official_files(
    name: str, same_as: str, unpack: Callable[[str], Path]
) -> None:
    assert_same(ours.read_checkpoint(unpack(name)), EXPECTED[same_as]["ema"])


def test_training_state_of_an_official_file(unpack: Callable[[str], Path]) -> None:
    got, expected = (
        ours.read_training_state(unpack("training-state.pt")),
        EXPECTED["training-state.pt"],
    )
    assert got["images_seen"] == expected["images_seen"]
    for part in ("ema", "net", "exp_avg", "exp_avg_sq"):
        assert_same(got[part], expected[part])


def test_a_network_read_from_an_official_file_denoises_as_it_did(
    unpack: Callable[[str], Path],
) -> None:
    arrays, settings = golden("edm_release")
    params = ours.read_checkpoint(unpack("edm_release.pkl"))
    got = ours.unet(
        params, network_config(settings), arrays["x"], arrays["sigma"], arrays["class_labels"], None
    )
    assert_close(got["D_x"], arrays["D_x"], 3e-5, per="row")


# Metrics.


def test_feature_statistics_and_fid() -> None:
    arrays, _ = golden("metrics")
    for name in ("ref", "sample"):
        mean, covariance = ours.feature_stats(arrays[name])
        assert_close(mean, arrays[f"mu_{name}"], 1e-6)
        assert_close(covariance, arrays[f"sigma_{name}"], 1e-6)
    assert_close(ours.fid(arrays["ref"], arrays["sample"]), arrays["fid"], 1e-6)


def test_precision_and_recall_count_exactly() -> None:
    arrays, settings = golden("metrics")
    got = ours.precision_recall(arrays["ref"], arrays["sample"], neighbours=settings["nhood"])
    np.testing.assert_allclose(got, [arrays["precision"], arrays["recall"]], rtol=1e-12)


def test_inception_score() -> None:
    arrays, settings = golden("metrics")
    odds = np.exp(arrays["is_acts"].astype(np.float64) @ arrays["is_weight"] + arrays["is_bias"])
    probabilities = odds / odds.sum(axis=1, keepdims=True)
    assert_close(
        ours.inception_score(probabilities, split_size=settings["is_split"]),
        arrays["inception_score"],
        1e-6,
    )


# Augmentation.

TRANSFORMS = ("xflip", "yflip", "scale", "rotate_frac", "aniso", "translate_frac")


def augment_draws(case: str) -> dict[str, Array]:
    """The recorded draws by name; those of transforms that the case leaves out are neutral."""
    arrays, _ = golden("augment")
    n = len(arrays["x"])
    draws = {f"{kind}_gate": np.ones(n) for kind in TRANSFORMS}
    draws |= {
        k: np.zeros(n)
        for k in ("scale_normal", "aniso_normal", "rotate_frac_uniform", "aniso_angle_uniform")
    }
    draws |= {"aniso_rotate_gate": np.ones(n), "translate_frac_normal": np.zeros((2, n))}
    draws |= {k: np.zeros(n) for k in ("xflip_choice", "yflip_choice")}
    for key, value in below(arrays, f"{case}_draw").items():  # 05_scale_gate
        name = key.partition("_")[2]
        draws[name] = value.reshape(draws[name].shape)
    return {k: v.astype(np.int32 if k.endswith("choice") else np.float32) for k, v in draws.items()}


@cases("augment")
def test_augmentation(case: str) -> None:
    arrays, settings = golden("augment")
    multipliers = dict.fromkeys(TRANSFORMS, 0) | settings["cases"][case]
    images, labels = ours.augment(
        arrays["x"],
        augment_draws(case),
        **multipliers,
        scale_std=0.2,
        rotate_frac_max=1.0,
        aniso_std=0.2,
        translate_frac_std=0.125,
    )
    columns = {"only_xflip": [0], "only_yflip": [1]}.get(case, list(range(9)))
    want = np.zeros((len(arrays["x"]), 9))
    want[:, columns] = arrays[f"{case}_labels"]
    assert_close(images, arrays[f"{case}_out"], 2e-4)
    assert_close(labels, want, 1e-5)


# Pixels.


@pytest.mark.parametrize(
    "edit, key", [("none", "generate"), ("imagenet", "imagenet"), ("celebahq", "celebahq")]
)
def test_pixels_and_their_edits(edit: str, key: str) -> None:
    arrays, _ = golden("post")
    colour, grey = arrays[f"png_{key}"], arrays[f"png_gray_{key}"][..., None]
    for images, want in ((arrays["x"], colour), (arrays["x"][:, :1], grey)):
        got = ours.to_uint8(images, edit=edit)
        assert got.dtype == np.uint8
        difference = np.abs(
            got.astype(int) - want
        )  # one level where float32 falls to the other side of an edge
        assert difference.max() <= 1 and np.mean(difference > 0) <= 1e-3
