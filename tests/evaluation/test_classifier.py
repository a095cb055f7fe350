"""Classifiers learn classes that are easy to tell apart, and score samples with them."""

from functools import partial

import numpy as np
import pytest

from relay_jax.data.images import ImageSource
from relay_jax.evaluation import classifier
from relay_jax.evaluation.classifier import Classifier, about_classifier, class_accuracies
from relay_jax.evaluation.features import FeatureExtractor


class Colours(ImageSource):
    """Noisy 8 px images whose brightest channel is their class."""

    num_classes, class_names, resolution = 3, ("red", "green", "blue"), 8

    def __init__(self, count: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.labels = rng.integers(0, 3, count).astype(np.int32)
        images = 0.3 * rng.normal(size=(count, 8, 8, 3)) - 0.5
        images[np.arange(count), :, :, self.labels] += 1
        self.images = images.astype(np.float32)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        pixels = np.clip(self.images[position] * 127.5 + 128, 0, 255).astype(np.uint8)
        return pixels, int(self.labels[position])

    def fingerprint(self) -> str:
        return ""


def test_classes_that_are_easy_to_tell_apart_are_learned() -> None:
    train, unseen = Colours(192, 0), Colours(300, 1)  # more than one batch of predictions
    classes = Classifier(train.images, train.labels, 3, epochs=10, batch=32)(unseen.images)
    assert classes.shape == (300,)
    assert np.mean(classes == unseen.labels) > 0.98


def extractor(name: str) -> FeatureExtractor:
    """Features: the mean of each channel, and four that say nothing."""

    def compute(pixels: np.ndarray) -> dict[str, np.ndarray]:
        means = pixels.mean((1, 2)) / 255
        return {"pool": np.concatenate([means, pixels[:, :2, :2, 0].reshape(-1, 4) / 255], 1)}

    return FeatureExtractor(name=name, identity={}, outputs=("pool",), batch=32, compute=compute)


RANDOM = extractor("random-conv")


def test_a_linear_layer_on_features_sees_the_classes_asked_for() -> None:
    samples = Colours(200, 2)
    classes = np.where(np.arange(200) < 150, samples.labels, (samples.labels + 1) % 3)
    trained = extractor("trained")
    accuracies = class_accuracies(Colours(480, 3), {"": samples.images}, classes, 8, trained)
    assert accuracies["_real"] == 1 and accuracies[""] == 0.75
    assert "linear layer on the features of trained" in about_classifier(trained)


def test_samples_of_another_class_than_asked_for_are_seen() -> None:
    samples = Colours(60, 2)
    classes = np.where(np.arange(60) < 45, samples.labels, (samples.labels + 1) % 3)
    accuracies = class_accuracies(Colours(480, 3), {"": samples.images}, classes, 8, RANDOM)
    assert set(accuracies) == {"", "_real"}
    assert accuracies["_real"] > 0.95 and abs(accuracies[""] - 0.75) < 0.05


class Sorted(Colours):
    """The same, one class after the other, as most data sets are."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__(count, seed)
        order = np.argsort(self.labels, kind="stable")
        self.labels, self.images = self.labels[order], self.images[order]

    def known_labels(self) -> np.ndarray:
        return self.labels


def test_of_a_large_sorted_set_all_classes_are_learned_and_held_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(classifier, "TRAINING_IMAGES", 240)
    monkeypatch.setattr(classifier, "HELD_OUT_IMAGES", 60)
    source, shown = Sorted(3000, 3), []
    monkeypatch.setattr(classifier, "Classifier", partial(Remembering, shown))
    accuracies = class_accuracies(source, {}, np.zeros(0), 8, RANDOM)
    assert np.bincount(shown[0]).tolist() == [80, 80, 80]
    assert accuracies["_real"] > 0.95


class Remembering(Classifier):
    """Notes what it is trained on."""

    def __init__(self, shown: list, images: np.ndarray, labels: np.ndarray, number: int) -> None:
        shown.append(labels)
        super().__init__(images, labels, number)
