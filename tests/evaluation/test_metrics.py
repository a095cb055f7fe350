"""Metrics: closed forms, scipy and brute force, any split into parts or blocks, degenerate
sets, refusals."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist

from relay_jax.evaluation import metrics
from relay_jax.evaluation.metrics import (
    Moments,
    feature_stats,
    fid,
    frechet_distance,
    inception_score,
    precision_recall,
)


def features(count: int, dims: int, seed: int = 0) -> np.ndarray:
    """Correlated features of very different spread, as those of a network are; float32."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dims, dims)) * np.exp(-np.linspace(0, 4, dims))
    return (rng.normal(size=(count, dims)) @ mix.T + rng.normal(size=dims)).astype(np.float32)


# Mean and covariance.


def test_statistics_are_those_of_numpy_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 40)  # several parts, the last one short
    x = features(150, 7)
    mean, covariance = feature_stats(x)
    assert mean.dtype == covariance.dtype == np.float64
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.astype(np.float64).T), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("sizes", [(150,), (1, 1, 148), (70, 80), (149, 1)])
def test_parts_and_hosts_combine_to_the_same_statistics(sizes: tuple[int, ...]) -> None:
    x = features(150, 7)
    parts = np.split(x, np.cumsum(sizes)[:-1])
    updated, merged = Moments(7), Moments(7)
    for part in parts:
        updated.update(part)
        host = Moments(7)
        host.update(part)
        merged.merge(host)
    merged.merge(Moments(7))  # a host without images
    assert updated.count == merged.count == 150
    for got in (updated, merged):
        for value, want in zip(got.statistics(), feature_stats(x), strict=True):
            np.testing.assert_allclose(value, want, rtol=1e-10, atol=1e-13)


def test_merging_leaves_the_other_and_what_was_returned_alone() -> None:
    a, b = Moments(3), Moments(3)
    b.update(features(10, 3))
    before = [x.copy() for x in b.statistics()]
    a.merge(b)
    returned = a.statistics()
    a.update(features(10, 3, seed=1))
    for got in (b.statistics(), returned):
        for value, want in zip(got, before, strict=True):
            np.testing.assert_array_equal(value, want)


def test_a_large_common_offset_costs_no_digits() -> None:
    x = np.random.default_rng(0).normal(size=(400, 3))
    moments = Moments(3)
    for part in np.split(x + 1e7, 4):
        moments.update(part)
    np.testing.assert_allclose(
        moments.statistics()[1], np.cov(x.T), atol=1e-7
    )  # 1e14 * 1e-16 = 0.01 otherwise


# Frechet distance.


def covariance(dims: int, seed: int, rank: int | None = None) -> np.ndarray:
    factor = np.random.default_rng(seed).normal(size=(dims, rank or 2 * dims))
    return factor @ factor.T


def test_gaussians_with_common_axes_differ_by_their_means_and_deviations() -> None:
    axes = scipy.linalg.orth(np.random.default_rng(0).normal(size=(5, 5)))
    s, t = np.array([0.0, 1e-4, 1.0, 3.0, 100.0]), np.array([2.0, 1e-4, 0.5, 3.0, 80.0])
    mean_a, mean_b = np.zeros(5), np.arange(5.0)
    got = frechet_distance(mean_a, axes * s**2 @ axes.T, mean_b, axes * t**2 @ axes.T)
    np.testing.assert_allclose(got, 30 + np.sum((s - t) ** 2), rtol=1e-9)


def test_the_cross_term_is_the_trace_of_scipys_matrix_root() -> None:
    a, b, mean = covariance(12, 0), covariance(12, 1), np.arange(12.0)
    want = mean @ mean + np.trace(a + b - 2 * np.real(scipy.linalg.sqrtm(a @ b)))
    np.testing.assert_allclose(frechet_distance(mean, a, 0 * mean, b), want, rtol=1e-9)
    np.testing.assert_allclose(frechet_distance(0 * mean, b, mean, a), want, rtol=1e-9)


@pytest.mark.parametrize("rank", [40, 5, 1])
def test_a_distribution_is_at_distance_zero_of_itself_whatever_its_rank(rank: int) -> None:
    a, mean = covariance(40, 2, rank), np.ones(40)
    got = frechet_distance(mean, a, mean, a)
    assert 0 <= got < 1e-11 * np.trace(a)  # roots of eigenvalues of A A would leave 1e-8


def test_distributions_without_a_common_direction_add_up() -> None:
    a, b = np.zeros((6, 6)), np.zeros((6, 6))
    a[:3, :3], b[3:, 3:] = covariance(3, 0), covariance(3, 1)
    np.testing.assert_allclose(
        frechet_distance(np.zeros(6), a, np.zeros(6), b), np.trace(a + b), rtol=1e-12
    )


def test_fid_of_a_shifted_set_is_the_square_of_the_shift() -> None:
    x, shift = features(60, 8).astype(np.float64), np.linspace(-1, 2, 8)
    np.testing.assert_allclose(fid(x, x + shift), shift @ shift, rtol=1e-10)
    assert fid(x, x[::-1]) < 1e-10


def test_fid_of_a_stretched_set_is_the_change_of_its_deviations() -> None:
    x = features(60, 8).astype(np.float64)
    mean, cov = feature_stats(x)
    np.testing.assert_allclose(fid(x, 1.5 * x), 0.25 * (mean @ mean + np.trace(cov)), rtol=1e-9)


def test_fid_works_with_fewer_images_than_features_and_does_not_depend_on_their_order() -> None:
    x, y = features(9, 30), features(12, 30, seed=1)
    permutation = np.random.default_rng(0).permutation(30)
    value = fid(x, y)
    assert value > 0
    np.testing.assert_allclose(
        [fid(y, x), fid(x[:, permutation], y[:, permutation])], value, rtol=1e-11
    )
    # Both clouds lie in a space of 9 + 12 - 1 dimensions: the same there, without a singular
    # direction in common.
    axes = scipy.linalg.orth(np.concatenate([x, y]).T.astype(np.float64))
    np.testing.assert_allclose(fid(x @ axes, y @ axes), value, rtol=1e-11)


# Precision and recall.


def by_hand(ref: np.ndarray, sample: np.ndarray, neighbours: int) -> tuple[float, float]:
    ref, sample = ref.astype(np.float64), sample.astype(np.float64)
    cross = cdist(ref, sample)
    radius_ref, radius_sample = (np.sort(cdist(x, x), axis=1)[:, neighbours] for x in (ref, sample))
    return (
        np.mean((cross <= radius_ref[:, None]).any(axis=0)),
        np.mean((cross <= radius_sample).any(axis=1)),
    )


@pytest.mark.parametrize("neighbours", [1, 3, 5])
@pytest.mark.parametrize("block", [1, 7, 64, 10_000])
def test_precision_and_recall_are_those_of_all_distances_at_whatever_block(
    neighbours: int, block: int
) -> None:
    rng = np.random.default_rng(0)
    ref, sample = rng.normal(size=(61, 4)), (1.3 * rng.normal(size=(40, 4)) + 1).astype(np.float32)
    want = by_hand(ref, sample, neighbours)
    assert 0 < want[0] < 1 and 0 < want[1] < 1 and want[0] != want[1]
    assert precision_recall(ref, sample, neighbours, block) == want


def test_a_set_covers_itself_and_not_one_far_away() -> None:
    x = features(30, 6)
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x, x + 1e3) == (0.0, 0.0)
    # Tight samples around one image of a wide set: all look real, few real images are found.
    tight = x[:1] + 1e-3 * features(30, 6, seed=1)
    precision, recall = precision_recall(x, tight)
    assert precision == 1.0 and recall == 1 / 30


def test_points_on_the_border_of_a_ball_are_inside() -> None:
    ref = np.arange(8.0)[:, None] * 2  # the third neighbour is 4 or, at the ends, 6 away
    assert precision_recall(ref, np.full((4, 1), 20.0)) == (1.0, 0.0)
    assert precision_recall(ref, np.full((4, 1), 20.001)) == (0.0, 0.0)


def test_copies_of_one_image_have_a_ball_without_extent() -> None:
    same = np.full((5, 3), 0.5)
    assert precision_recall(same, same) == (1.0, 1.0)
    assert precision_recall(same, same + 0.1) == (0.0, 0.0)


def test_the_smallest_possible_sets_are_one_larger_than_the_neighbours() -> None:
    x = features(4, 6)
    assert precision_recall(x, x, 3) == (1.0, 1.0)


# Inception score.


def test_certain_and_even_predictions_score_the_number_of_classes_and_sure_guesses_of_one_class_score_one() -> (
    None
):
    np.testing.assert_allclose(inception_score(np.tile(np.eye(10), (7, 1))), 10)
    np.testing.assert_allclose(inception_score(np.tile(np.eye(10)[:1], (7, 1))), 1)
    np.testing.assert_allclose(inception_score(np.full((7, 10), 0.1)), 1)


def test_the_score_is_the_mean_over_splits_in_order_and_a_short_one_counts_fully() -> None:
    p = np.random.default_rng(0).dirichlet(np.full(5, 0.3), size=25)

    def one(p: np.ndarray) -> float:
        return np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0))), axis=1)))

    np.testing.assert_allclose(inception_score(p), one(p))
    np.testing.assert_allclose(
        inception_score(p, split_size=10), np.mean([one(p[:10]), one(p[10:20]), one(p[20:])])
    )
    np.testing.assert_allclose(
        inception_score(p.astype(np.float32), split_size=10), inception_score(p, 10), rtol=1e-6
    )


# Refusals.


def poisoned(value: float) -> np.ndarray:
    x = features(20, 6)
    x[3, 2] = x[7, 0] = value
    return x


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "score",
    [
        feature_stats,
        lambda x: fid(features(20, 6), x),
        lambda x: fid(x, features(20, 6)),
        lambda x: precision_recall(features(20, 6), x),
        inception_score,
        lambda x: precision_recall(x, features(20, 6)),
        Moments(6).update,
    ],
)
def test_numbers_that_are_not_finite_are_refused_with_their_count(
    score: Callable, value: float
) -> None:
    with pytest.raises(ValueError, match=r"^2 of 20 images have \w+ that are not finite$"):
        score(poisoned(value))


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: precision_recall(features(3, 6), features(9, 6)),
            r"3 and 9 images are too few for 3 neighbours.*least 4",
        ),
        (
            lambda: precision_recall(features(9, 6), features(5, 6), 5),
            "9 and 5 images are too few for 5",
        ),
        (
            lambda: precision_recall(features(9, 6), features(9, 6), 0),
            "neighbours must be at least 1",
        ),
        (lambda: precision_recall(features(9, 6), features(9, 5)), "6 and 5 features"),
        (lambda: feature_stats(features(1, 6)), "at least 2 images, not 1"),
        (lambda: fid(features(9, 6), features(1, 6)), "at least 2 images, not 1"),
        (lambda: fid(features(9, 6), features(9, 5)), "do not fit"),
        (lambda: feature_stats(np.zeros((0, 6))), r"not of shape \[0, 6\]"),
        (lambda: feature_stats(np.zeros(6)), r"not of shape \[6\]"),
        (lambda: Moments(6).update(features(9, 5)), "5 features per image do not fit to 6"),
        (lambda: Moments(6).merge(Moments(5)), "5 features per image do not fit to 6"),
        (lambda: Moments(6).statistics(), "at least 2 images, not 0"),
        (
            lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.nan)),
            "not finite",
        ),
        (
            lambda: frechet_distance(np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)),
            r"\[2\], \[3, 3\]",
        ),
        (lambda: inception_score(np.full((4, 5), 0.3)), "sum to 1"),
        (lambda: inception_score(np.tile([1.5, -0.5], (4, 1))), "must not be negative"),
        (lambda: inception_score(np.eye(5), 0), "split_size must be at least 1"),
        (lambda: inception_score(np.ones(5)), r"probabilities must be a table"),
    ],
)
def test_what_has_no_score_is_refused_in_one_line(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
