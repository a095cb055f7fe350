"""KID, MIND, density and coverage: closed forms, brute force, what is expected of equal sets."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from relay_jax.evaluation import kernel_distance as kernel_distance_module
from relay_jax.evaluation import neighbours
from relay_jax.evaluation.kernel_distance import (
    kernel_distance,
    kernel_distance_without,
    kernel_mmd,
    kid,
)
from relay_jax.evaluation.neighbours import neighbour_scores, neighbour_shares, shares_without
from relay_jax.evaluation.sliced_distance import directions, mind, sliced_distance
from relay_jax.evaluation.statistics import FeatureSet


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# Kernel distance.


def test_the_kernel_distance_is_its_definition() -> None:
    a, b = normal(0, 30, 3), normal(1, 20, 3) + 1
    within = [
        np.mean(
            [(x[i] @ x[j] / 3 + 1) ** 3 for i in range(len(x)) for j in range(len(x)) if i != j]
        )
        for x in (a, b)
    ]
    between = np.mean([(x @ y / 3 + 1) ** 3 for x in a for y in b])
    assert kernel_mmd(a, b) == pytest.approx(sum(within) - 2 * between)
    # Of constant features: the squared difference of two powers.
    two, one = np.full((5, 1), 2.0), np.ones((4, 1))
    assert kernel_mmd(one, two) == pytest.approx(8 + 125 - 2 * 27)
    assert kid(a[:20], b) == kernel_mmd(a[:20], b)


def test_the_kernel_distance_of_equal_distributions_is_zero_on_average() -> None:
    values = [kernel_mmd(*normal(seed, 2, 20, 3)) for seed in range(300)]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * error and min(values) < 0 < max(values)
    # With the pairs of an image and itself it would not be.
    assert np.mean([(x @ x / 3 + 1) ** 3 for x in normal(0, 100, 3)]) / 20 > 20 * error


def test_subsets_estimate_what_whole_sets_do_and_are_always_the_same() -> None:
    a, b = normal(0, 400, 4), normal(1, 300, 4) + 0.3
    whole, parts = kernel_mmd(a, b), kid(a, b, subsets=200, subset=50)
    assert parts == kid(a, b, subsets=200, subset=50) != kid(a, b, subsets=100, subset=50)
    assert whole == pytest.approx(parts, rel=0.1)
    # Subsets are no larger than the smaller set, and each of it is then whole.
    # Four standard errors of subsets that scatter by 0.154.
    assert kid(a, b[:40], subsets=2000) == pytest.approx(kernel_mmd(a, b[:40]), abs=0.014)


# Sliced distance.


def test_a_shift_has_three_times_its_square_in_expectation() -> None:
    # With d features the mean over directions has a relative error of sqrt(2 / 1000).
    shift, x = 0.1 * np.arange(30.0), normal(0, 50, 30)
    value = mind(x, x + shift)
    assert value == pytest.approx(3 * shift @ shift, rel=4 * np.sqrt(2 / 1000))
    share = (directions(30).T @ shift) ** 2
    assert value == pytest.approx(3 * 30 * share.mean())
    # Of one feature every direction says the same: exact.
    assert mind(x[:, :1], x[::-1, :1] + 2) == pytest.approx(3 * 4)


def test_a_stretched_gaussian_has_three_times_the_squares_of_its_change() -> None:
    # Along u a standard gaussian stays one; stretched by s it is s wide: (s - 1)^2 for every u.
    x = normal(0, 20_000, 3)
    assert mind(x, 1.5 * x, count=64) == pytest.approx(3 * 3 * 0.25, rel=0.02)
    assert mind(x, normal(1, 20_000, 3), count=64) < 0.01


def test_sets_of_different_sizes_are_compared_by_their_quantiles() -> None:
    a, b = normal(0, 6, 4), normal(1, 9, 4)
    # Each image as often as both sets are then of one size.
    expected = mind(np.repeat(a, 3, axis=0), np.repeat(b, 2, axis=0))
    assert mind(a, b) == pytest.approx(expected, rel=1e-12)
    assert mind(b, a) == pytest.approx(expected, rel=1e-12)
    assert mind(a, np.repeat(a, 7, axis=0)) == 0
    assert mind(np.array([[0.0], [1.0]]), np.array([[0.0], [0.0], [1.0]])) == pytest.approx(3 / 6)


def test_directions_are_units_that_stay() -> None:
    vectors = directions(5)
    assert vectors.shape == (5, 1000)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=0), 1)
    np.testing.assert_allclose(vectors @ vectors.T / 1000, np.eye(5) / 5, atol=0.03)
    np.testing.assert_array_equal(directions(5, 10), vectors[:, :10])


# Density and coverage.


@pytest.mark.parametrize("block", [7, 1000])
def test_density_and_coverage_are_those_of_all_distances(block: int) -> None:
    real, fake = normal(0, 61, 4), 1.2 * normal(1, 40, 4) + 0.5
    radii = np.sort(cdist(real, real), axis=1)[:, 5]
    held = cdist(real, fake) <= radii[:, None]
    scores = neighbour_scores(real, fake, block=block)
    assert scores["density"] == held.sum() / (5 * 40)
    assert scores["coverage"] == held.any(axis=1).mean()
    assert 0 < scores["density"] < 1 and 0 < scores["coverage"] < 1


def test_equal_distributions_have_density_one_and_the_papers_coverage() -> None:
    n, m = 50, 40
    both = [neighbour_scores(normal(s, n, 3), normal(s + 1000, m, 3)) for s in range(200)]
    expected = {"density": 1, "coverage": 1 - np.prod([(n - i) / (n + m - i) for i in range(1, 6)])}
    for name, value in expected.items():
        values = [scores[name] for scores in both]
        assert np.mean(values) == pytest.approx(value, abs=4 * np.std(values) / np.sqrt(200)), name


def test_an_outlier_raises_precision_and_not_density() -> None:
    real = np.concatenate([normal(0, 60, 2), [[100.0, 0.0]]])
    fake = normal(1, 60, 2) + np.array([60.0, 0.0])
    scores = neighbour_scores(real, fake)
    assert scores["precision"] == 1 and scores["density"] == pytest.approx(1 / 5)
    assert scores["coverage"] == pytest.approx(1 / 61)


def test_few_reference_images_have_no_density() -> None:
    assert list(neighbour_scores(normal(0, 5, 2), normal(1, 9, 2))) == ["precision", "recall"]
    assert len(neighbour_scores(normal(0, 6, 2), normal(1, 4, 2))) == 4


# Scores without groups of the samples.


@pytest.mark.parametrize("alike", [0, 30])
def test_scores_without_groups_are_those_of_the_other_samples(
    alike: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (neighbours, kernel_distance_module):
        monkeypatch.setattr(module, "BLOCK", 16)
    real, fake, group = normal(0, 61, 4), 1.2 * normal(1, 90, 4) + 0.3, np.arange(90) % 3
    # One group in one place: a neighbour of another group is farther than all candidates.
    fake[np.flatnonzero(group == 0)[:alike]] = 0.01 * normal(2, alike, 4)
    sets = [FeatureSet(count=len(rows), rows=rows) for rows in (real, fake)]
    together = shares_without(*sets, group) | kernel_distance_without(*sets, group)
    for number in range(3):
        rest = fake[group != number]
        expected = neighbour_scores(real, rest) | {"KID": kernel_mmd(real, rest)}
        values = {name: each[number] for name, each in together.items()}
        assert values == pytest.approx(expected, rel=1e-12)


# Names and refusals.


def test_metrics_of_rows_need_rows() -> None:
    rows = FeatureSet(count=9, rows=normal(0, 9, 3))
    for metric in (kernel_distance, sliced_distance, neighbour_shares):
        assert metric(rows, FeatureSet(count=9)) == metric(FeatureSet(count=9), rows) == {}
        assert all(np.isfinite(list(metric(rows, rows).values())))


@pytest.mark.parametrize("metric", [kid, mind, neighbour_scores])
def test_sets_that_cannot_be_compared_are_refused(metric: Callable) -> None:
    with pytest.raises(ValueError, match="4 and 3 features per image cannot be compared"):
        metric(normal(0, 9, 4), normal(0, 9, 3))
    bad = normal(0, 9, 4)
    bad[2, 1] = np.nan
    with pytest.raises(ValueError, match="1 of 9 images have features that are not finite"):
        metric(normal(0, 9, 4), bad)
    with pytest.raises(ValueError, match="too few"):
        kid(normal(0, 9, 4), normal(0, 1, 4))
