"""Collecting features: moments of any parts, kept rows in order, the same on all hosts."""

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from relay_jax.errors import Stopped
from relay_jax.evaluation import statistics
from relay_jax.evaluation.images import ArrayImages, Part, choice
from relay_jax.evaluation.statistics import FeatureSet, Moments, collect, feature_stats
from relay_jax.runtime import distributed
from tests.conftest import error_of
from tests.evaluation.fakes import extractor, known


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8)


def features(count: int, dims: int, seed: int = 0) -> np.ndarray:
    """Correlated features of very different spread, as those of a network are; float32."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dims, dims)) * np.exp(-np.linspace(0, 4, dims))
    return (rng.normal(size=(count, dims)) @ mix.T + rng.normal(size=dims)).astype(np.float32)


# Mean and covariance.


def test_statistics_are_those_of_numpy_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 40)  # several parts, the last one short
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


# Collecting.


def same(features: FeatureSet, images: np.ndarray) -> None:
    """The set holds what these images have, in their order."""
    for name, pair in features.statistics.items():
        for got, want in zip(pair, feature_stats(known(images)[name]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert features.count == len(images) and set(features.statistics) == {"pool", "spatial"}
    np.testing.assert_array_equal(features.rows, known(images)["pool"])


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_features_are_collected_whole_and_in_order(
    batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "BLOCK", 5)  # moments from several parts
    images = pixels(23)
    features = collect(
        ArrayImages(images, {}), extractor(batch=batch), what="samples", rows=23, probabilities=True
    )
    same(features, images)
    np.testing.assert_array_equal(features.probabilities, known(images)["probabilities"])


def test_a_part_of_the_rows_is_kept_by_a_rule() -> None:
    images = pixels(23)
    features = collect(ArrayImages(images, {}), extractor(), what="reference", rows=7)
    np.testing.assert_array_equal(features.rows, known(images)["pool"][choice(23, 7)])
    assert features.count == 23 and features.probabilities is None


def test_features_that_are_not_finite_are_refused() -> None:
    message = error_of(
        lambda: collect(ArrayImages(pixels(9), {}), extractor(bad=2), what="samples")
    )
    assert (
        "samples, inception: 5 of 9 images in a batch have features that are not finite" in message
    )


class Backwards(ArrayImages):
    """Parts in another order than that of the images, as they may come from a sampler."""

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        yield from list(super().share(host, hosts, batch))[::-1]


@pytest.mark.parametrize(
    ("hosts", "count", "rows"), [(1, 23, 23), (2, 23, 23), (3, 23, 7), (5, 4, 4)]
)
def test_all_hosts_end_with_the_features_of_all_images(
    monkeypatch: pytest.MonkeyPatch, hosts: int, count: int, rows: int
) -> None:
    """Threads in the place of processes; with five hosts and four images one has none."""
    messages, barrier = dict[int, np.ndarray](), threading.Barrier(hosts)

    def number() -> int:
        return int(threading.current_thread().name)

    def of_all(value: np.ndarray) -> np.ndarray:
        messages[number()] = value
        barrier.wait()
        everyone = np.stack([messages[host] for host in range(hosts)])
        barrier.wait()
        return everyone

    monkeypatch.setattr(distributed, "of_all", of_all)
    monkeypatch.setattr(statistics.jax, "process_count", lambda: hosts)
    monkeypatch.setattr(statistics.jax, "process_index", number)
    images, features = pixels(count), dict[int, FeatureSet]()

    def host() -> None:
        features[number()] = collect(
            Backwards(images, {}), extractor(batch=1), what="samples", rows=rows, probabilities=True
        )

    threads = [threading.Thread(target=host, name=str(index)) for index in range(hosts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(features) == hosts
    for one in features.values():
        np.testing.assert_array_equal(one.probabilities, known(images)["probabilities"])
        np.testing.assert_array_equal(one.rows, known(images)["pool"][choice(count, rows)])
        for name, pair in one.statistics.items():
            for got, want in zip(pair, feature_stats(known(images)[name]), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)


def test_sigterm_is_answered_here_or_left_to_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "stop_requested", lambda: True)
    images = ArrayImages(pixels(40), {})
    with pytest.raises(Stopped, match="after 16 of 40 images of samples"):
        collect(images, extractor(), what="samples")
    assert collect(images, extractor(), what="samples", stop=False).count == 40


def test_a_covariance_needs_two_images() -> None:
    message = error_of(lambda: collect(ArrayImages(pixels(1), {}), extractor(), what="samples"))
    assert "samples: a covariance needs at least 2 images" in message
