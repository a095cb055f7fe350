"""U-Net: a float64 reference, published sizes, labels, places of attention, memory, refusals."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.models.network import init_params, parameter_count, shapes_of
from relay_jax.models.unet import UNet, noise_embedding
from tests.models.test_blocks import block_by_hand, conv_by_hand, norm_by_hand, silu

SMALL = UNet(
    resolution=8,
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention=(4,),
    head_width=8,
    num_classes=4,
    num_augment=9,
)
ONE_LEVEL = replace(SMALL, multipliers=(1,), attention=())  # compiles in a second
BASE = UNet(resolution=64, channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(32, 16, 8))
RELAY = UNet(
    resolution=256, channels=256, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(32, 16, 8)
)
X = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
C_NOISE = np.array([-0.7, 0.4], np.float32)
CLASSES = np.eye(4, dtype=np.float32)[[2, 0]]
AUGMENT = np.random.default_rng(1).normal(size=(2, 9)).astype(np.float32)


def filled(network: UNet, scale: float = 0.2) -> dict:
    """Random parameters, none of them zero."""
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32), shapes_of(network)
    )


def compiled(network: UNet, train: bool = False) -> Callable[..., jax.Array]:
    """(params, x, c_noise, class_labels, augment_labels, [dropout key]) -> output."""

    def run(
        params: dict, x: object, c_noise: object, classes: object, augment: object, *keys: object
    ) -> jax.Array:
        rngs = dict(zip(["dropout"], keys, strict=False))
        return network.apply({"params": params}, x, c_noise, classes, augment, train, rngs=rngs)

    return jax.jit(run)


def by_hand(p: dict, classes: np.ndarray, augment: np.ndarray) -> np.ndarray:
    """SMALL in float64, layer by layer, for X and C_NOISE."""
    angle = C_NOISE.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(4) / 4)
    embedding = (
        np.concatenate([np.cos(angle), np.sin(angle)], axis=1)
        + augment @ p["map_augment"]["kernel"]
    )
    embedding = silu(embedding @ p["map_layer0"]["kernel"] + p["map_layer0"]["bias"])
    embedding = (
        embedding @ p["map_layer1"]["kernel"]
        + p["map_layer1"]["bias"]
        + classes @ p["map_label"]["kernel"]
    )
    embedding = silu(embedding)

    def block(name: str, x: np.ndarray, resample: str = "", heads: int = 0) -> np.ndarray:
        return block_by_hand(x, embedding, p[name], resample, heads)

    skips = [conv_by_hand(X, **p["enc_8x8_conv"])]
    skips.append(block("enc_8x8_block0", skips[-1]))
    skips.append(block("enc_4x4_down", skips[-1], "down"))
    skips.append(block("enc_4x4_block0", skips[-1], heads=2))
    x = block("dec_4x4_in1", block("dec_4x4_in0", skips[-1], heads=2))
    x = block("dec_4x4_block0", np.concatenate([x, skips[3]], axis=-1), heads=2)
    x = block("dec_4x4_block1", np.concatenate([x, skips[2]], axis=-1), heads=2)
    x = block("dec_8x8_up", x, "up")
    x = block("dec_8x8_block0", np.concatenate([x, skips[1]], axis=-1))
    x = block("dec_8x8_block1", np.concatenate([x, skips[0]], axis=-1))
    return conv_by_hand(
        silu(norm_by_hand(x, p["out_norm"]["scale"], p["out_norm"]["bias"], 2)), **p["out_conv"]
    )


@pytest.fixture(scope="module")
def params() -> dict:
    return filled(SMALL)


@pytest.fixture(scope="module")
def network() -> Callable[..., jax.Array]:
    return compiled(SMALL)


@pytest.fixture(scope="module")
def one_level() -> tuple[dict, Callable[..., jax.Array]]:
    return filled(ONE_LEVEL), compiled(ONE_LEVEL)


def test_network_equals_its_definition(params: dict, network: Callable[..., jax.Array]) -> None:
    got, want = network(params, X, C_NOISE, CLASSES, AUGMENT), by_hand(params, CLASSES, AUGMENT)
    assert want.std() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


# Sizes and structure


@pytest.mark.parametrize("network, count", [(BASE, 295_899_267), (RELAY, 553_831_171)])
def test_class_conditional_networks_have_the_published_number_of_parameters(
    network: UNet, count: int
) -> None:
    assert parameter_count(shapes_of(replace(network, num_classes=1000))) == count


@pytest.mark.parametrize("network, millions", [(BASE, 295.13), (RELAY, 552.81)])
def test_unconditional_networks_with_augmentation_labels_are_of_published_size(
    network: UNet, millions: float
) -> None:
    assert round(parameter_count(shapes_of(replace(network, num_augment=9))) / 1e6, 2) == millions


def test_attention_is_on_its_levels_and_in_the_first_decoder_block_alone() -> None:
    network = UNet(
        resolution=16, channels=8, multipliers=(1, 2, 2), blocks=2, attention=(8,), head_width=8
    )
    having = {name for name, module in shapes_of(network).items() if "attention" in module}
    assert having == {
        "enc_8x8_block0",
        "enc_8x8_block1",
        "dec_8x8_block0",
        "dec_8x8_block1",
        "dec_8x8_block2",
        "dec_4x4_in0",
    }
    assert {"dec_4x4_in1", "enc_8x8_down", "dec_8x8_up", "dec_16x16_up"} < set(shapes_of(network))


def test_levels_narrower_than_a_head_have_no_attention() -> None:
    network = UNet(
        resolution=8, channels=8, multipliers=(1, 2), blocks=1, attention=(8, 4), head_width=16
    )
    having = {name for name, module in shapes_of(network).items() if "attention" in module}
    assert having == {"enc_4x4_block0", "dec_4x4_block0", "dec_4x4_block1", "dec_4x4_in0"}
    assert not any(
        "attention" in module for module in shapes_of(replace(network, head_width=64)).values()
    )


def test_three_levels_of_24_pixels_keep_the_shape_of_the_image() -> None:
    network = UNet(resolution=24, channels=4, multipliers=(1, 1, 2), blocks=1, image_channels=1)
    shapes = shapes_of(network)
    assert {
        "enc_24x24_conv",
        "enc_12x12_down",
        "enc_6x6_down",
        "dec_6x6_in0",
        "dec_24x24_up",
    } < set(shapes)
    x = jax.ShapeDtypeStruct((3, 24, 24, 1), jnp.float32)
    out = jax.eval_shape(lambda p, x: network.apply({"params": p}, x, jnp.zeros(3)), shapes, x)
    assert out.shape == x.shape and out.dtype == jnp.float32


# Initialisation and embedding


def test_a_fresh_network_answers_zero_and_only_the_named_layers_are_zero(
    one_level: tuple[dict, Callable[..., jax.Array]],
) -> None:
    fresh = jax.jit(partial(init_params, ONE_LEVEL))(
        jax.random.key(0, impl="rbg")
    )  # the faster one to compile
    np.testing.assert_array_equal(
        one_level[1](fresh, X, C_NOISE, CLASSES, AUGMENT), np.zeros_like(X)
    )
    zero = {
        path[:-1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(fresh)
        if path[-1].key == "kernel" and not np.any(leaf)
    }
    for path in zero:
        assert path[-1].key in ("conv1", "proj", "map_augment", "out_conv")
    blocks, heads = (
        sum("conv1" in m for m in fresh.values()),
        sum("attention" in m for m in fresh.values()),
    )
    assert len(zero) == blocks + heads + 2
    np.testing.assert_allclose(
        np.std(fresh["map_label"]["kernel"]), 1, atol=0.25
    )  # 128 standard normals


def test_noise_embedding_is_cosines_then_sines_of_falling_frequencies() -> None:
    c_noise = np.array([-1.55, 0.0, 1.1], np.float32)
    angle = c_noise.astype(np.float64)[:, None] * 10000.0 ** (-np.arange(6) / 6)
    got = noise_embedding(jnp.asarray(c_noise), 12)
    np.testing.assert_allclose(
        got, np.concatenate([np.cos(angle), np.sin(angle)], axis=1), atol=1e-6
    )


# Labels


def test_no_labels_are_zero_labels(one_level: tuple[dict, Callable[..., jax.Array]]) -> None:
    params, run = one_level
    zeros = run(params, X, C_NOISE, np.zeros_like(CLASSES), np.zeros_like(AUGMENT))
    np.testing.assert_allclose(run(params, X, C_NOISE, None, None), zeros, rtol=1e-5, atol=1e-5)


def test_every_input_of_the_network_matters(
    params: dict, network: Callable[..., jax.Array]
) -> None:
    output = network(params, X, C_NOISE, CLASSES, AUGMENT)
    changed = [
        (X + 0.1, C_NOISE, CLASSES, AUGMENT),
        (X, C_NOISE + 0.1, CLASSES, AUGMENT),
        (X, C_NOISE, CLASSES[:, ::-1], AUGMENT),
        (X, C_NOISE, CLASSES, -AUGMENT),
    ]
    for inputs in changed:
        assert np.abs(network(params, *inputs) - output).max() > 1e-3


def test_images_of_a_batch_do_not_see_each_other(
    params: dict, network: Callable[..., jax.Array]
) -> None:
    output = network(params, X, C_NOISE, CLASSES, AUGMENT)
    swapped = network(params, X[::-1], C_NOISE[::-1], CLASSES[::-1], AUGMENT[::-1])
    np.testing.assert_allclose(swapped[::-1], output, rtol=1e-5, atol=1e-5)


# Options


def test_remat_changes_neither_parameters_nor_output_nor_gradients() -> None:
    params = filled(ONE_LEVEL)

    def run(network: UNet) -> tuple[jax.Array, dict]:
        def scalar(p: dict) -> jax.Array:
            return jnp.mean(
                jnp.square(network.apply({"params": p}, X, C_NOISE, CLASSES, AUGMENT, True))
            )

        return jax.jit(jax.value_and_grad(scalar))(params)

    remat = replace(ONE_LEVEL, remat=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes_of(ONE_LEVEL), shapes_of(remat))
    (value, gradient), (value_remat, gradient_remat) = run(ONE_LEVEL), run(remat)
    np.testing.assert_allclose(value_remat, value, rtol=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient))
    assert largest > 1e-3
    chex.assert_trees_all_close(gradient_remat, gradient, rtol=1e-3, atol=1e-5 * largest)


def test_bfloat16_is_close_to_float32_and_answers_in_float32(
    one_level: tuple[dict, Callable[..., jax.Array]],
) -> None:
    half = replace(ONE_LEVEL, dtype=jnp.bfloat16)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes_of(ONE_LEVEL), shapes_of(half))
    params, run = one_level
    inputs = (params, X, C_NOISE, CLASSES, AUGMENT)
    want, got = np.asarray(run(*inputs)), compiled(half)(*inputs)
    assert got.dtype == jnp.float32
    error = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-4 < error < 0.05  # from below too: the precision really is lower


def test_dropout_acts_in_training_alone(one_level: tuple[dict, Callable[..., jax.Array]]) -> None:
    dropping = replace(ONE_LEVEL, dropout=0.5)
    inputs = (one_level[0], X, C_NOISE, CLASSES, AUGMENT)
    plain = one_level[1](*inputs)
    np.testing.assert_allclose(compiled(dropping)(*inputs), plain, atol=1e-5)
    train = compiled(dropping, train=True)
    first, again, other = (train(*inputs, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2 and np.abs(first - plain).max() > 1e-2


# Refusals


@pytest.mark.parametrize(
    "change, message",
    [
        ({"channels": 0}, r"model\.channels must be a positive whole number, not 0"),
        ({"channels": 8.0}, r"model\.channels must be a positive whole number, not 8\.0"),
        ({"channels": 9}, r"model\.channels must be even, not 9"),
        ({"blocks": -1}, r"model\.blocks must be a positive"),
        ({"head_width": 0}, r"model\.head_width must be a positive"),
        ({"dropout": 1.0}, r"model\.dropout must lie in \[0, 1\)"),
        ({"resolution": 9}, r"resolution 9 cannot be halved 1 times \(model\.multipliers has 2\)"),
        ({"multipliers": ()}, r"cannot be halved"),
        ({"channels": 6}, r"6 channels cannot be normalised in 1 groups|multiples of 4"),
        ({"attention": (5,)}, r"model\.attention asks for level 5, but the levels are \[8, 4\]"),
        ({"head_width": 17}, r"model\.attention at level 4 needs at least head_width 17"),
    ],
)
def test_fields_that_make_no_network_are_refused_by_their_key(change: dict, message: str) -> None:
    SMALL.check()
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change).check()


@pytest.mark.parametrize(
    "place, value, message",
    [
        (0, X[0], r"x must be \[b, h, w, 3\]"),
        (1, C_NOISE[:1], r"c_noise must be \[b\]"),
        (2, np.array([2, 0]), r"class_labels must be \[b, 4\]"),
        (3, AUGMENT[:, :8], r"augment_labels must be \[b, 9\]"),
    ],
)
def test_inputs_of_other_shapes_are_refused_by_name(
    place: int, value: np.ndarray, message: str
) -> None:
    inputs = [X, C_NOISE, CLASSES, AUGMENT]
    inputs[place] = value
    with pytest.raises(AssertionError, match=message):
        jax.eval_shape(lambda p: SMALL.apply({"params": p}, *inputs), shapes_of(SMALL))
