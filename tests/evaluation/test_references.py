"""References: what is taken from which file, what the cache keeps and when it is not believed,
what does not fit."""

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.data.decoding import Decoding
from relay_jax.data.images import center_crop_resize
from relay_jax.data.source import Source
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import UserError
from relay_jax.evaluation import references
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.images import ArrayImages, choice, open_images
from relay_jax.evaluation.metrics import inception_score, score
from relay_jax.evaluation.neighbours import precision_recall
from relay_jax.evaluation.references import (
    Reference,
    check_sizes,
    open_reference,
    reference_features,
)
from relay_jax.evaluation.statistics import FeatureSet, collect, feature_stats
from tests.conftest import error_of
from tests.evaluation.fakes import DIMS, Calls, extractor, known


def pixels(count: int, side: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def shapes() -> tuple[Source, dict[str, object]]:
    return SyntheticShapes(8, 20, 0), {"source": "synthetic", "size": 20}


def opened(text: str, resolution: int = 4, limit: int = 0) -> Reference:
    return open_reference(text, resolution, data_set=shapes, threads=1, limit=limit)


def features_of(
    text: str, cache: Path, network: FeatureExtractor | None = None, **more: int
) -> FeatureSet:
    features = reference_features(opened(text, **more), network or extractor(), cache=cache)
    assert features is not None
    return features


def same(features: FeatureSet, images: np.ndarray) -> None:
    """The set holds what these images have, in their order."""
    for name, statistics in features.statistics.items():
        for got, want in zip(statistics, feature_stats(known(images)[name]), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12)
    assert features.count == len(images) and set(features.statistics) == {"pool", "spatial"}
    np.testing.assert_array_equal(features.rows, known(images)["pool"])


# What is read.


def test_a_folder_is_cropped_and_resized_to_the_samples(tmp_path: Path) -> None:
    originals = np.random.default_rng(0).integers(0, 256, (6, 9, 12, 3), dtype=np.uint8)
    for number, image in enumerate(originals):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    same(
        features_of(str(tmp_path), tmp_path / "cache"),
        np.stack([center_crop_resize(x, 4) for x in originals]),
    )
    assert "resize to 4 px" in opened(str(tmp_path)).identity["preparation"]


def test_the_data_set_or_a_choice_of_it(tmp_path: Path) -> None:
    source, _ = shapes()
    small = np.stack([center_crop_resize(source[i][0], 4) for i in range(20)])
    same(features_of("dataset", tmp_path), small)
    same(features_of("dataset", tmp_path, limit=6), small[choice(20, 6)])


def adm(folder: Path, images: np.ndarray | None, dims: int = DIMS, spatial: bool = True) -> Path:
    """ADM's layout: statistics that are those of no image here, so that it shows which ones are
    used."""
    arrays = {"mu": np.arange(dims, dtype=np.float64), "sigma": 2 * np.eye(dims)}
    if spatial:
        arrays |= {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    if images is not None:
        arrays["arr_0"] = images
    np.savez(folder / "VIRTUAL.npz", **arrays)
    return folder / "VIRTUAL.npz"


def test_adms_reference_gives_statistics_and_images_for_neighbours(tmp_path: Path) -> None:
    file, images = adm(tmp_path, pixels(9)), pixels(9)
    features = features_of(str(file), tmp_path / "cache")
    np.testing.assert_array_equal(features.statistics["pool"][0], np.arange(DIMS))
    np.testing.assert_array_equal(features.statistics["spatial"][1], np.eye(3))
    np.testing.assert_array_equal(features.rows, known(images)["pool"])
    samples = collect(
        ArrayImages(pixels(12, seed=1), {}),
        extractor(),
        what="samples",
        rows=12,
        probabilities=True,
    )
    scores = score(features, samples, "inception")
    names = ["FID", "sFID", "MIND", "KID", "IS", "precision", "recall", "density", "coverage"]
    assert list(scores) == names
    mean, cov = samples.statistics["spatial"]
    root = np.linalg.eigvalsh(cov)
    np.testing.assert_allclose(
        scores["sFID"], mean @ mean + 3 + np.trace(cov) - 2 * np.sqrt(root).sum(), rtol=1e-9
    )
    assert scores["IS"] == inception_score(known(pixels(12, seed=1))["probabilities"])
    assert (scores["precision"], scores["recall"]) == precision_recall(
        known(images)["pool"], samples.rows
    )


def test_other_features_take_its_images_alone(tmp_path: Path) -> None:
    file, images = adm(tmp_path, pixels(9)), pixels(9)
    same(features_of(str(file), tmp_path / "cache", extractor("other")), images)


def test_edms_statistics_give_fid_alone(tmp_path: Path) -> None:
    features = features_of(
        str(adm(tmp_path, None, spatial=False)), tmp_path / "cache", resolution=7
    )
    samples = collect(ArrayImages(pixels(12), {}), extractor(), what="samples", rows=12)
    assert list(score(features, samples, "inception")) == ["FID"]
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("make", "action", "says"),
    [
        (
            lambda t: adm(t, pixels(9, side=6)),
            lambda f, t: opened(str(f)),
            "images of 6 px, the samples have 4",
        ),
        (
            lambda t: adm(t, None, dims=5),
            lambda f, t: features_of(str(f), t),
            "statistics of 5 features, inception has 6",
        ),
        (
            lambda t: adm(t, None),
            lambda f, t: features_of(str(f), t, extractor("other")),
            "use --features=inception",
        ),
        (
            lambda t: np.savez(t / "x.npz", arr=np.zeros(3), mu=np.zeros(3)) or t / "x.npz",
            lambda f, t: opened(str(f)),
            "wanted arr_0 (images) or mu and sigma (statistics), it holds arr, mu",
        ),
        (
            lambda t: np.savez(t / "x.npz", mu=np.zeros(3), sigma=np.eye(4)) or t / "x.npz",
            lambda f, t: opened(str(f)),
            "no mean and covariance",
        ),
        (
            lambda t: (
                np.savez(t / "x.npz", mu=np.zeros(1), sigma=np.full((1, 1), np.nan)) or t / "x.npz"
            ),
            lambda f, t: opened(str(f)),
            "no mean and covariance",
        ),
        (
            lambda t: (t / "x.npz").write_text("text") and t / "x.npz",
            lambda f, t: opened(str(f)),
            "not a readable npz",
        ),
        (
            lambda t: np.save(t / "x.npy", np.zeros(3)) or t / "x.npy",
            lambda f, t: opened(str(f)),
            "not a readable npz",
        ),
        (lambda t: t, lambda f, t: opened(str(f)), "no images found"),
        (
            lambda t: t / "nowhere",
            lambda f, t: opened(str(f)),
            "'dataset' is the data set of the configuration",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(
    tmp_path: Path, make: Callable[[Path], Path], action: Callable[[Path, Path], object], says: str
) -> None:
    file = make(tmp_path)
    assert says in error_of(lambda: action(file, tmp_path / "cache"))


def test_a_zip_and_a_folder_are_shown_as_in_training(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[0x0112] = 3
    image = np.zeros((8, 8, 3), np.uint8)
    image[:4] = 240
    (tmp_path / "set").mkdir()
    for number in range(4):
        Image.fromarray(image).save(tmp_path / "set" / f"{number}.png", exif=turned)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in (tmp_path / "set").iterdir():
            archive.write(file, file.name)
    for place in ("set", "set.zip"):
        for exif, top in ((True, 0), (False, 240)):
            reference = open_reference(
                str(tmp_path / place), 4, data_set=shapes, threads=1, decoding=Decoding(exif=exif)
            )
            assert reference.images is not None and len(reference.images) == 4
            _, part = next(reference.images.share(0, 1, 4))
            assert (part[:, 0] == top).all()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["edm2", "flat"])
def test_edm2s_pickled_references_are_read(tmp_path: Path, protocol: int, kind: str) -> None:
    mean, cov = np.arange(DIMS, dtype=np.float64), np.asfortranarray(np.arange(36.0).reshape(6, 6))
    value: dict[str, object] = {"mu": mean, "sigma": cov}
    if kind == "edm2":
        value = {"fid": value, "fd_dinov2": {"mu": np.ones(3), "sigma": np.eye(3)}}
    file = tmp_path / "ref.pkl"
    file.write_bytes(pickle.dumps(value, protocol))
    statistics = features_of(str(file), tmp_path / "cache").statistics
    np.testing.assert_array_equal(statistics["pool"][0], mean)
    np.testing.assert_array_equal(statistics["pool"][1], cov)
    assert "not known" in opened(str(file)).identity["preparation"]


class Hostile:
    """A pickle of it would make a file where it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_pickle_runs_and_what_it_misses_is_named(tmp_path: Path) -> None:
    file = tmp_path / "ref.pkl"
    for value, message in (
        (Hostile(tmp_path / "it-ran"), "posix.mkdir', which is not on the list"),
        ({"fid": {"mu": np.ones(2)}}, "no statistics of Inception (fid: mu and sigma) but mu"),
        ({"fd_dinov2": {}}, "but fd_dinov2"),
        ({"mu": np.ones(2), "sigma": np.eye(3)}, "no mean and covariance ([2], [3, 3])"),
        ({"mu": np.array([None]), "sigma": 1}, "not a readable file of statistics"),
        ([1, 2], "holds no dictionary"),
    ):
        file.write_bytes(pickle.dumps(value))
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            opened(str(file))
        assert str(file) in str(caught.value) and len(str(caught.value)) < 400
    assert not (tmp_path / "it-ran").exists()


def test_statistics_of_an_unknown_resize_are_noted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reference = opened(str(adm(tmp_path, None)))
    assert reference.identity["preparation"] == "as the file's makers did it: not known"
    assert "cropped and resized is not known" in caplog.text


def test_an_npz_of_thousands_of_arrays_is_one_short_line(tmp_path: Path) -> None:
    file = tmp_path / "x.npz"
    np.savez(file, **{f"{'x' * 50}{n}": np.zeros(1) for n in range(3000)})
    for action in (lambda: opened(str(file)), lambda: open_images(file, 1)):
        message = error_of(action)
        assert "(3,000 in all)" in message and len(message) < 400


def test_sets_that_are_too_small_are_refused_before_anything_is_computed(tmp_path: Path) -> None:
    few, many = ArrayImages(pixels(3), {}), ArrayImages(pixels(9), {})
    whole = Reference(identity={}, images=many)
    check_sizes(whole, many)
    assert "3 images as samples: 3 neighbours need at least 4" in error_of(
        lambda: check_sizes(whole, few)
    )
    assert "3 images as reference" in error_of(
        lambda: check_sizes(Reference(identity={}, images=few), many)
    )
    statistics = opened(str(adm(tmp_path, None)))
    check_sizes(statistics, few)
    assert "1 image as samples: a covariance" in error_of(
        lambda: check_sizes(statistics, ArrayImages(pixels(1), {}))
    )


# The cache.


def test_the_cache_spares_the_network(tmp_path: Path) -> None:
    calls = Calls()
    first = features_of("dataset", tmp_path, extractor(calls=calls))
    assert sum(calls) == 20 and len(list(tmp_path.iterdir())) == 1
    again = features_of("dataset", tmp_path, extractor(calls=calls))
    assert sum(calls) == 20
    for a, b in zip(
        (first.rows, *first.statistics["pool"]),
        (again.rows, *again.statistics["pool"]),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    assert first.count == again.count == 20


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def altered(file: Path) -> None:
    with np.load(file) as archive:
        arrays = dict(archive)
    arrays["mean_pool"] = arrays["mean_pool"] + 1e-9
    np.savez(file, **arrays)


def foreign(file: Path) -> None:
    np.savez(file, about=np.asarray("{}"))


@pytest.mark.parametrize(
    "damage", [truncated, flipped, altered, foreign, lambda file: file.write_text("")]
)
def test_a_damaged_cache_is_computed_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    calls = Calls()
    features_of("dataset", tmp_path, extractor(calls=calls))
    damage(next(tmp_path.iterdir()))
    small = np.stack([center_crop_resize(shapes()[0][i][0], 4) for i in range(20)])
    same(features_of("dataset", tmp_path, extractor(calls=calls)), small)
    assert sum(calls) == 40
    features_of("dataset", tmp_path, extractor(calls=calls))
    assert sum(calls) == 40, "the file was not mended"


@pytest.mark.parametrize("change", ["version", "resolution", "limit", "rows", "touch"])
def test_features_of_something_else_are_not_taken_from_the_cache(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number, image in enumerate(pixels(8, side=8)):
        Image.fromarray(image).save(folder / f"{number}.png")
    calls = Calls()
    features_of(str(folder), tmp_path / "cache", extractor(calls=calls))
    if change == "touch":
        os.utime(folder / "3.png", ns=(1, 1))
    if change == "rows":
        monkeypatch.setattr(references, "NEIGHBOUR_IMAGES", 5)
    more = {"resolution": {"resolution": 8}, "limit": {"limit": 7}}.get(change, {})
    features_of(
        str(folder),
        tmp_path / "cache",
        extractor(calls=calls, version=2 if change == "version" else 1),
        **more,
    )
    assert len(calls) == 4 and len(list((tmp_path / "cache").iterdir())) == 2


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert features_of("dataset", tmp_path / "file" / "cache").count == 20
