"""Averages: profiles in closed form, widths, and what sums of kept averages can be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.models.averages import (
    Profile,
    combination,
    gamma_of,
    name_of,
    parse_name,
    power_share,
    profile_weights,
    width_of,
)

STEPS = 240


def averaged(values: np.ndarray, width: float) -> np.ndarray:
    """Equation (1) over a sequence [t], in float64 by hand: the average after each step."""
    averages, average = [], 0.0
    for t, value in enumerate(values, 1):
        average += (1 - (1 - 1 / t) ** (gamma_of(width) + 1)) * (value - average)
        averages.append(average)
    return np.asarray(averages)


def moments_of(weights: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a profile over time, as shares of its length."""
    places = (np.arange(len(weights)) + 0.5) / len(weights)
    mean = weights @ places
    return mean, float(np.sqrt(weights @ (places - mean) ** 2))


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56)])
def test_published_widths_have_the_published_exponents(width: float, gamma: float) -> None:
    """gamma of arXiv 2312.02696, section 3: 16.97 and 6.94 for 0.05 and 0.10."""
    assert gamma_of(width) == pytest.approx(gamma, abs=0.01)
    assert width_of(gamma_of(width)) == pytest.approx(width, rel=1e-12)
    weights = profile_weights(Profile(100_000, width))
    assert weights.sum() == pytest.approx(1, rel=1e-12)
    mean, deviation = moments_of(weights)
    exponent = gamma_of(width)
    assert mean == pytest.approx((exponent + 1) / (exponent + 2), rel=1e-4)
    assert deviation == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.02, 0.05, 0.1, 0.28])
def test_the_update_has_the_profile_in_closed_form(width: float) -> None:
    values = np.random.default_rng(0).normal(size=STEPS).cumsum()
    np.testing.assert_allclose(
        averaged(values, width)[-1], profile_weights(Profile(STEPS, width)) @ values, rtol=1e-10
    )
    steps = np.array([1, 2, 10, 1000, 10**6, 3 * 10**7])
    want = [1, *-np.expm1((gamma_of(width) + 1) * np.log1p(-1 / steps[1:]))]
    got = jax.jit(power_share, static_argnums=1)(jnp.asarray(steps), width)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("width", [0.03, 0.08, 0.2])
def test_a_spanned_average_is_reconstructed_to_rounding(width: float) -> None:
    """A snapshot after every step spans every profile: the average of any sequence is exact."""
    values = np.random.default_rng(1).normal(size=60)
    kept = [Profile(t, 0.1) for t in range(1, 61)]
    weights, error = combination(kept, Profile(60, width))
    assert weights @ averaged(values, 0.1) == pytest.approx(averaged(values, width)[-1], abs=1e-6)
    assert error < 1e-6 and weights.sum() == pytest.approx(1, abs=1e-12)


def test_a_kept_average_is_itself_and_one_snapshot_of_many_is_chosen() -> None:
    kept = [Profile(t, width) for t in (60, 120, 180, STEPS) for width in (0.05, 0.1)]
    for place, profile in enumerate(kept):
        weights, error = combination(kept, profile)
        np.testing.assert_allclose(weights, np.eye(len(kept))[place], atol=1e-6)
        assert error < 1e-6


def test_other_widths_are_near_from_a_few_snapshots_and_nearer_from_more() -> None:
    """The error that is reported is that of the profile, and bounds that of any sequence."""
    time = np.arange(1, STEPS + 1) / STEPS
    values = np.exp(-5 * time) + 0.1 * np.sin(20 * time)
    errors = []
    for count in (8, 24):
        ends = [STEPS * (n + 1) // count for n in range(count)]
        kept = [Profile(t, width) for t in ends for width in (0.05, 0.1)]
        sequence = [averaged(values, p.width)[p.step - 1] for p in kept]
        for width in (0.07, 0.15):
            weights, error = combination(kept, Profile(STEPS, width))
            want = averaged(values, width)[-1]
            bound = error * np.linalg.norm(profile_weights(Profile(STEPS, width)))
            assert abs(weights @ sequence - want) <= bound * np.linalg.norm(values)
            full = np.zeros(STEPS)
            for x, profile in zip(weights, kept, strict=True):
                full[: profile.step] += x * profile_weights(profile)
            target = profile_weights(Profile(STEPS, width))
            assert error == pytest.approx(
                np.linalg.norm(full - target) / np.linalg.norm(target), rel=1e-3
            )
            errors.append(error)
    assert max(errors) < 0.04 and max(errors[2:]) < 0.2 * max(errors[:2])


def test_names_are_those_of_the_numbers() -> None:
    assert [name_of(value) for value in (0.05, 0.1, 2e6)] == ["0.05", "0.1", "2000000"]
    assert [parse_name(text) for text in ("0.10", 0.08, "2e6", "ema", "")] == [
        "0.1",
        "0.08",
        "2000000",
        "",
        "",
    ]
    for text in ("fast", "0.5", "-1", "nan", "1e400"):
        with pytest.raises(ValueError, match="names no average"):
            parse_name(text)
