"""Metrics: closed forms, scipy and brute force, any blocks, degenerate sets, names, refusals."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
from scipy.spatial.distance import cdist

from relay_jax.errors import DataError
from relay_jax.evaluation import metrics
from relay_jax.evaluation.images import ArrayImages
from relay_jax.evaluation.metrics import (
    fid,
    frechet_distance,
    inception_score,
    notes,
    ratios,
    score,
)
from relay_jax.evaluation.neighbours import precision_recall
from relay_jax.evaluation.statistics import FeatureSet, Moments, collect, feature_stats
from tests.conftest import error_of
from tests.evaluation.fakes import extractor


def features(count: int, dims: int, seed: int = 0) -> np.ndarray:
    """Correlated features of very different spread, as those of a network are; float32."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dims, dims)) * np.exp(-np.linspace(0, 4, dims))
    return (rng.normal(size=(count, dims)) @ mix.T + rng.normal(size=dims)).astype(np.float32)


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


def test_the_score_is_the_number_of_classes_that_are_predicted_surely_and_evenly() -> None:
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


# Scores by name.


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def feature_set(count: int, name: str = "inception") -> FeatureSet:
    return collect(
        ArrayImages(pixels(count, count), {}),
        extractor(name),
        what="samples",
        rows=count,
        probabilities=True,
    )


def test_too_few_images_are_one_line() -> None:
    message = error_of(lambda: score(feature_set(9), feature_set(3), "inception"))
    assert "9 and 3 images are too few" in message and "3 samples" in message


def test_scores_of_other_features_are_not_called_fid() -> None:
    a, b = feature_set(9, "other"), feature_set(12, "other")
    names = ["FD", "sFD", "MIND", "KID", "IS", "precision", "recall", "density", "coverage"]
    assert list(score(a, b, "other")) == [f"{name}-other" for name in names]
    assert list(score(a, b, "inception")) == ["FID", "sFID", *names[2:]]
    assert list(score(a, b, "other").values()) == list(score(a, b, "inception").values())


def test_a_score_needs_what_it_is_computed_from() -> None:
    a, b = feature_set(9), feature_set(12)
    statistics = FeatureSet(count=0, statistics={"pool": a.statistics["pool"]})
    assert list(score(statistics, FeatureSet(count=12, statistics=b.statistics), "inception")) == [
        "FID"
    ]
    with pytest.raises(DataError):
        score(FeatureSet(count=0, rows=a.rows), FeatureSet(count=2, rows=b.rows[:2]), "inception")


def test_a_new_metric_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(reference: FeatureSet, samples: FeatureSet) -> dict[str, float]:
        return {"shift": float(np.abs(reference.rows.mean(0) - samples.rows.mean(0)).max())}

    monkeypatch.setitem(metrics.METRICS, "shift", shift)
    a, b = feature_set(9, "other"), feature_set(12, "other")
    assert score(a, b, "other")["shift-other"] == shift(a, b)["shift"] > 0


def test_distances_have_ratios_to_those_of_real_images() -> None:
    scores = {"FD-x": 6.0, "MIND-x": 9.0, "KID-x": 0.1, "recall-x": 0.5}
    real = {"FD-x": 2.0, "MIND-x": 0.0, "KID-x": 0.01, "recall-x": 0.6}
    assert ratios(scores, real, "x") == {"FD-x": 3.0}
    assert ratios({"FID": 3.0, "sFID": 2.0}, {"FID": 2.0}, "inception") == {"FID": 1.5}
    assert ratios({"FID": 3.0}, {}, "inception") == {}


def test_notes_warn_of_few_images_and_other_features() -> None:
    text = " ".join(notes(feature_set(5, "other"), "other"))
    assert "FD-other is not FID" in text and "5 samples" in text
    assert "Fewer samples than features (5 and 6)" in text
    assert "not FID" not in " ".join(notes(feature_set(5), "inception"))
