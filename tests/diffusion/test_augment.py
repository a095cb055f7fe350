"""Augmentation: exact flips and shifts, positions in closed form, labels, independence."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.diffusion import augment
from relay_jax.diffusion.augment import Augmentation, Draws

draw = jax.jit(augment.draw, static_argnums=1)
apply_draws = jax.jit(augment.apply_draws, static_argnums=2)
ALL = Augmentation(probability=1.0)
WIDTH = 24


def some_draws(batch: int = 2, **values: object) -> Draws:
    """Draws under which nothing is active; the values given replace them, and a value opens its
    transform's gate."""
    neutral = dict.fromkeys(Draws._fields, 0.0) | {
        f: 1.0 for f in Draws._fields if f.endswith("gate")
    }
    neutral |= {"rotate_frac_uniform": 0.5, "aniso_angle_uniform": 0.5}
    for name in values:
        neutral[name.rsplit("_", 1)[0].removesuffix("_angle") + "_gate"] = 0.0
    draws = {name: np.float32(values.get(name, value)) for name, value in neutral.items()}
    shapes = {name: (2, batch) if name == "translate_frac_normal" else (batch,) for name in draws}
    draws["translate_frac_normal"] = draws["translate_frac_normal"].reshape(-1, 1)
    draws = {name: np.broadcast_to(value, shapes[name]) for name, value in draws.items()}
    return Draws(
        **{name: v.astype(np.int32) if name.endswith("choice") else v for name, v in draws.items()}
    )


def noise(width: int = WIDTH, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (batch, width, width, 3)).astype(np.float32)


def smooth(width: int = WIDTH) -> np.ndarray:
    y, x = np.mgrid[:width, :width] / width
    channels = [np.sin(5 * x + y), np.cos(4 * x * y + 1), x - y * y]
    return np.stack(channels, -1)[None].astype(np.float32)


def test_flips_are_exact() -> None:
    images = noise(batch=4)
    draws = some_draws(4, xflip_choice=[0, 1, 0, 1], yflip_choice=[0, 0, 1, 1])
    got, labels = apply_draws(images, draws, ALL)
    want = [images[0], images[1][:, ::-1], images[2][::-1], images[3][::-1, ::-1]]
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(labels[:, :2], [[0, 0], [1, 0], [0, 1], [1, 1]])
    np.testing.assert_array_equal(labels[:, 2:], 0)
    assert got.dtype == labels.dtype == jnp.float32


def test_probability_zero_changes_nothing_and_any_other_flips_half() -> None:
    images, draws = noise(batch=64), draw(jax.random.key(0), 64)
    got, labels = apply_draws(images, draws, Augmentation(probability=0.0))
    np.testing.assert_array_equal(got, images)
    np.testing.assert_array_equal(labels, np.zeros((64, 9)))

    got, labels = apply_draws(images, draws, Augmentation(probability=1e-7))
    flipped = np.asarray(labels[:, 0]) == 1
    assert 16 < flipped.sum() < 48
    np.testing.assert_array_equal(
        got, np.where(flipped[:, None, None, None], images[:, :, ::-1], images)
    )
    np.testing.assert_array_equal(labels[:, 1:], 0)


def test_inactive_and_switched_off_transforms_leave_pixels_and_labels_alone() -> None:
    images = noise(batch=8)
    draws = draw(jax.random.key(1), 8)
    shut = draws._replace(**{f: jnp.ones(8) for f in Draws._fields if f.endswith("_gate")})
    got, labels = apply_draws(images, shut, Augmentation(probability=0.5, xflip=0.0))
    np.testing.assert_array_equal(got, images)
    np.testing.assert_array_equal(labels, 0)

    flips_only = Augmentation(
        probability=1.0, scale=0.0, rotate_frac=0.0, aniso=0.0, translate_frac=0.0
    )
    got, labels = apply_draws(images, draws, flips_only)
    np.testing.assert_array_equal(np.sort(got, axis=None), np.sort(images, axis=None))
    np.testing.assert_array_equal(labels[:, 2:], 0)


@pytest.mark.parametrize("width", [9, 24, 48])
def test_the_two_filters_undo_each_other(width: int) -> None:
    images = noise(width)
    got, _ = apply_draws(images, some_draws(scale_normal=0.0), ALL)
    np.testing.assert_allclose(got, images, atol=1e-5)


def test_filter_is_an_orthogonal_wavelet_with_six_vanishing_moments() -> None:
    taps, k = augment.SYM6, np.arange(12)
    products = [2 * np.dot(taps[2 * i :], taps[: 12 - 2 * i]) for i in range(6)]
    np.testing.assert_allclose(products, [1, 0, 0, 0, 0, 0], atol=1e-11)
    moments = [np.dot((-1.0) ** k, taps * (k / 11) ** m) for m in range(6)]
    np.testing.assert_allclose(moments, 0, atol=1e-11)
    assert taps.sum() == pytest.approx(1, abs=1e-12)


def test_whole_pixel_shift_moves_the_reflected_image() -> None:
    images = noise()
    right, down = 3, -6  # pixels
    normal = np.array([right, down]) / (WIDTH * ALL.translate_frac_std)
    got, labels = apply_draws(images, some_draws(translate_frac_normal=normal), ALL)
    margin = 8
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)), mode="reflect")
    want = padded[:, margin - down :, margin - right :][:, :WIDTH, :WIDTH]
    np.testing.assert_allclose(got, want, atol=2e-5)
    inside = np.s_[:, :down, right:]
    np.testing.assert_allclose(
        got[inside], np.roll(images, (down, right), (1, 2))[inside], atol=2e-5
    )
    np.testing.assert_allclose(labels, [[0] * 7 + [1, -2]] * 2, atol=1e-6)


@pytest.mark.parametrize("uniform, turns", [(0.75, 1), (0.25, -1), (0.0, 2)])
def test_quarter_turns(uniform: float, turns: int) -> None:
    image = smooth()
    got, labels = apply_draws(image, some_draws(1, rotate_frac_uniform=uniform), ALL)
    inside = np.s_[:, 4:-4, 4:-4]
    # The filters' centre of mass is a twentieth of a pixel beside the pixel (see below), which
    # a half turn doubles.
    np.testing.assert_allclose(got[inside], np.rot90(image, turns, (1, 2))[inside], atol=0.04)
    angle = turns * np.pi / 2
    np.testing.assert_allclose(labels[0, 3:5], [np.cos(angle) - 1, np.sin(angle)], atol=1e-6)


def test_positions_and_labels_follow_the_definition() -> None:
    """The two channels hold each pixel's own position, so the result shows where every pixel
    came from."""
    batch, width = 6, 48
    q = np.arange(width) - (width - 1) / 2
    positions = np.stack(np.meshgrid(q, q), -1)  # [h, w, (x, y)]
    images = np.broadcast_to(positions / width, (batch, width, width, 2))
    gates = {f: jnp.zeros(batch) for f in Draws._fields if f.endswith("gate")}
    draws = draw(jax.random.key(2), batch)._replace(
        **gates, xflip_choice=np.zeros(batch, np.int32), yflip_choice=np.zeros(batch, np.int32)
    )
    settings = Augmentation(probability=1.0, scale_std=0.3, rotate_frac_max=0.9, aniso_std=0.25)
    got, labels = apply_draws(images, draws, settings)

    # The filters and the bilinear reading are exact for linear functions, but for the filters'
    # centre of mass: it lies this many pixels beside the pixel (0.05), which cancels for shifts
    # only.
    beside = (np.dot(augment.SYM6, np.arange(12)) - augment.REACH) / 2

    def rotation(angle: float) -> np.ndarray:
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    for i in range(batch):
        n, m, shift = (
            draws.scale_normal[i],
            draws.aniso_normal[i],
            draws.translate_frac_normal[:, i],
        )
        theta = np.pi * (2 * draws.rotate_frac_uniform[i] - 1) * 0.9
        phi = np.pi * (2 * draws.aniso_angle_uniform[i] - 1)
        want = [0, 0, n, np.cos(theta) - 1, np.sin(theta), m * np.cos(phi), m * np.sin(phi), *shift]
        np.testing.assert_allclose(labels[i], want, atol=1e-6)

        # Forward: scale, turn, stretch along a turned axis, shift. y points down, so -theta is
        # anticlockwise.
        stretch = rotation(-phi) @ np.diag([2 ** (0.25 * m), 2 ** (-0.25 * m)]) @ rotation(phi)
        forward = stretch @ rotation(-theta) * 2 ** (0.3 * n)
        source = (positions + beside - 0.125 * width * np.asarray(shift)) @ np.linalg.inv(
            forward
        ).T - beside
        inside = (np.abs(source) < width / 2 - 8).all(-1)
        assert inside.sum() > 100
        np.testing.assert_allclose(got[i][inside] * width, source[inside], atol=1e-3)


def test_only_the_frame_of_the_stretch_turns_half_of_the_time() -> None:
    draws = some_draws(2, aniso_normal=1.5, aniso_angle_uniform=0.75)._replace(
        aniso_rotate_gate=np.array([0.49, 0.5], np.float32)
    )
    _, labels = apply_draws(noise(), draws, ALL)
    np.testing.assert_allclose(labels[:, 5:7], [[0, 1.5], [1.5, 0]], atol=1e-6)


def test_each_gate_opens_its_own_labels() -> None:
    columns = {"xflip": [0], "yflip": [1], "scale": [2], "rotate_frac": [3, 4]}
    columns |= {"aniso": [5, 6], "translate_frac": [7, 8]}
    draws = draw(jax.random.key(3), 1)._replace(
        xflip_choice=jnp.ones(1, int), yflip_choice=jnp.ones(1, int)
    )
    draws = draws._replace(**{f: jnp.full(1, 0.3) for f in Draws._fields if f.endswith("gate")})
    for name, active in columns.items():
        closed = {other: 0.5 for other in columns if other != name}  # 0.3 is not below 0.5 * 0.5
        _, labels = apply_draws(
            smooth(), draws, Augmentation(probability=0.5, **{name: 1.0}, **closed)
        )
        assert np.flatnonzero(np.asarray(labels[0])).tolist() == active, name


def test_beyond_the_reflected_margin_is_zero() -> None:
    images = np.ones((1, WIDTH, WIDTH, 1), np.float32)
    got, _ = apply_draws(
        images, some_draws(1, scale_normal=-15.0), ALL
    )  # to an eighth; the margins make it 3/8
    got = np.asarray(got)[0, :, :, 0]
    np.testing.assert_allclose(got[10:13, 10:13], 1, atol=1e-5)
    np.testing.assert_array_equal(got[:3], 0)


def test_an_image_and_its_draws_do_not_depend_on_the_batch() -> None:
    key, images = jax.random.key(4), noise(16, batch=5)
    run = jax.jit(augment.augment, static_argnums=2)
    many, labels = run(images, key, ALL)
    few, few_labels = run(images[:2], key, ALL)
    np.testing.assert_allclose(few, many[:2], atol=1e-6)
    np.testing.assert_array_equal(few_labels, labels[:2])
    assert not np.allclose(labels[0], labels[1])
    other, _ = run(images, jax.random.key(5), ALL)
    assert not np.allclose(other, many)


def test_is_the_same_plain_under_jit_and_under_vmap() -> None:
    images, settings = noise(16, batch=4).reshape(2, 2, 16, 16, 3), Augmentation(probability=0.5)
    draws = [draw(jax.random.key(seed), 2) for seed in (6, 7)]
    plain = augment.apply_draws(images[1], draws[1], settings)
    jitted = apply_draws(images[1], draws[1], settings)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *draws)
    mapped = jax.vmap(lambda x, d: apply_draws(x, d, settings))(images, stacked)
    for got in (jitted, jax.tree.map(lambda a: a[1], mapped)):
        np.testing.assert_allclose(got[0], plain[0], atol=1e-4)
        np.testing.assert_allclose(got[1], plain[1], atol=1e-5)


def test_draws_have_their_distributions() -> None:
    draws = draw(jax.random.key(7), 4000)
    for name, values in draws._asdict().items():
        values = np.asarray(values)
        assert values.shape == ((2, 4000) if name == "translate_frac_normal" else (4000,))
        if name.endswith("normal"):
            mean, std = 0, 1
        elif name.endswith("choice"):
            mean, std = 0.5, 0.5
            assert values.dtype == np.int32 and set(values.tolist()) == {0, 1}
        else:
            mean, std = 0.5, 12**-0.5
            assert values.min() >= 0 and values.max() < 1
        assert values.mean() == pytest.approx(mean, abs=4 * std / 4000**0.5), name
        assert values.std() == pytest.approx(std, rel=0.05), name
    flat = np.concatenate([np.asarray(v).reshape(-1, 4000) for v in draws])
    correlations = np.corrcoef(flat) - np.eye(len(flat))
    assert np.abs(correlations).max() < 0.08


def test_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(AssertionError, match="images must be floating-point"):
        apply_draws(np.zeros((1, 16, 16, 3), np.uint8), some_draws(1), ALL)
    with pytest.raises(AssertionError, match="draws must hold one number per image"):
        apply_draws(np.zeros((3, 16, 16, 3), np.float32), some_draws(1), ALL)
    with pytest.raises(AssertionError, match="index must be of whole numbers"):
        augment.draw(jax.random.key(0), 2, jnp.zeros(2))
    with pytest.raises(ValueError, match="square"):
        apply_draws(np.zeros((1, 16, 24, 3), np.float32), some_draws(1), ALL)
    with pytest.raises(ValueError, match="probability"):
        Augmentation(probability=12)
    with pytest.raises(ValueError, match="aniso_std"):
        dataclasses.replace(ALL, aniso_std=-1.0)
