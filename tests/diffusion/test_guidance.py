"""Guidance: the linear combination by hand, the interval inside jit, one batch of both
branches, refusals."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.diffusion.guidance import Guidance, Guide, autoguided, classifier_free

X = np.random.default_rng(0).normal(size=(3, 2, 2, 3)).astype(np.float32)
LABELS = np.eye(4, dtype=np.float32)[[2, 0, 3]]
TINT = np.random.default_rng(1).normal(size=(4, 3)).astype(np.float32)


def denoise(x: jax.Array, sigma: jax.Array, labels: jax.Array | None) -> jax.Array:
    """Nonlinear in x and different for every class; a zero label vector adds nothing."""
    tint = 0.0 if labels is None else (labels @ TINT)[:, None, None, :]
    return jnp.tanh(x) / (1 + sigma) + tint * sigma


def expected(weight: float, sigma: float) -> np.ndarray:
    conditional = np.tanh(X) / (1 + sigma) + TINT[[2, 0, 3]][:, None, None, :] * sigma
    return weight * conditional - (weight - 1) * np.tanh(X) / (1 + sigma)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_weights_up_to_one_are_the_plain_conditional_denoiser(weight: float) -> None:
    np.testing.assert_array_equal(
        classifier_free(denoise, LABELS, Guidance(weight=weight))(X, 0.7), denoise(X, 0.7, LABELS)
    )


@pytest.mark.parametrize("weight", [1.5, 3.5])
def test_weights_above_one_extrapolate_away_from_the_empty_label(weight: float) -> None:
    got = jax.jit(classifier_free(denoise, LABELS, Guidance(weight=weight)))(X, 0.7)
    np.testing.assert_allclose(got, expected(weight, 0.7), atol=1e-5)


def test_the_interval_is_closed_and_acts_inside_a_compiled_loop() -> None:
    guided = classifier_free(denoise, LABELS, Guidance(weight=3.0, interval=(0.25, 2.0)))
    sigmas = [0.0, 0.249, 0.25, 1.0, 2.0, 2.001, 80.0]
    got = jax.jit(lambda sigmas: jax.lax.map(lambda sigma: guided(X, sigma), sigmas))(
        jnp.array(sigmas)
    )
    want = [expected(3.0 if 0.25 <= sigma <= 2.0 else 1.0, sigma) for sigma in sigmas]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "interval, acts", [((0.0, 1.0), [True, True, False]), ((0.5, math.inf), [False, True, True])]
)
def test_the_interval_may_be_open_at_one_end(
    interval: tuple[float, float], acts: list[bool]
) -> None:
    guided = jax.jit(classifier_free(denoise, LABELS, Guidance(weight=2.0, interval=interval)))
    for sigma, active in zip([0.1, 0.7, 5.0], acts, strict=True):
        np.testing.assert_allclose(
            guided(X, sigma), expected(2.0 if active else 1.0, sigma), atol=1e-5
        )


def test_both_branches_share_one_call_and_outside_only_the_conditional_one_runs() -> None:
    batches = []

    def counting(x: jax.Array, sigma: jax.Array, labels: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: batches.append(len(x)))
        return denoise(x, sigma, labels)

    guided = jax.jit(classifier_free(counting, LABELS, Guidance(weight=2.0, interval=(0.5, 1.0))))
    for sigma, batch in [(0.7, 6), (0.1, 3)]:
        batches.clear()
        jax.block_until_ready(guided(X, sigma))
        jax.effects_barrier()
        assert batches == [batch]


def test_an_unconditional_network_cannot_be_guided_but_runs_unguided() -> None:
    np.testing.assert_array_equal(
        classifier_free(denoise, None, Guidance(weight=1.0))(X, 0.7), denoise(X, 0.7, None)
    )
    with pytest.raises(ValueError, match=r"guidance 1\.5 needs a class-conditional network"):
        classifier_free(denoise, None, Guidance(weight=1.5))


@pytest.mark.parametrize("interval", [(1.0, 1.0), (2.0, 1.0), (1.0,)])
def test_an_empty_interval_is_refused(interval: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="two rising sigmas"):
        Guidance(weight=2.0, interval=interval)


def test_a_negative_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"guidance must not be negative, not -0\.5"):
        Guidance(weight=-0.5)


def test_guidance_counts_the_images_that_the_network_sees_of_one() -> None:
    sigmas = np.array([80.0, 2.0, 1.0, 0.25])
    assert Guidance().evaluations(sigmas) == 4
    assert Guidance(weight=2.0).evaluations(sigmas) == 8
    assert Guidance(weight=2.0, interval=(0.5, 2.0)).evaluations(sigmas) == 6


def test_labels_of_another_number_of_images_are_refused_by_name() -> None:
    guided = classifier_free(denoise, LABELS[:2], Guidance(weight=2.0))
    with pytest.raises(AssertionError, match="x and class_labels"):
        guided(X, 0.7)


def test_autoguidance_extrapolates_away_from_the_guide_within_its_interval() -> None:
    """Equation 3 of arXiv 2406.02507; outside of the interval the guide is not called."""
    calls = []

    def worse(x: jax.Array, sigma: jax.Array, labels: jax.Array) -> jax.Array:
        jax.debug.callback(lambda: calls.append(len(x)))
        return 0.5 * denoise(x, sigma, labels)

    guide = Guide(weights="base@1", weight=2.5, interval=(0.25, 2.0))
    guided = jax.jit(autoguided(denoise, worse, LABELS, guide))
    for sigma, acts in [(0.2, False), (0.25, True), (2.0, True), (2.1, False)]:
        calls.clear()
        got = jax.block_until_ready(guided(X, sigma))
        jax.effects_barrier()
        assert bool(calls) == acts
        factor = 2.5 - 1.5 * 0.5 if acts else 1.0
        np.testing.assert_allclose(got, factor * expected(1.0, sigma), rtol=1e-5, atol=1e-5)
    assert guide.evaluations(np.array([80.0, 2.0, 1.0, 0.2])) == 2
    whole = autoguided(denoise, worse, None, Guide(weights="base@1", weight=1.5))(X, 0.7)
    np.testing.assert_allclose(whole, 1.25 * denoise(X, 0.7, None), rtol=1e-5)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"weight": 0.9}, "guide_weight must be at least 1"),
        ({"weight": math.inf}, "guide_weight must be"),
        ({"interval": (2.0, 1.0)}, "guide_interval must be two rising"),
    ],
)
def test_a_guide_that_cannot_be_is_refused(keys: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Guide(weights="base@1", **keys)
