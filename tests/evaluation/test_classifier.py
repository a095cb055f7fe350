"""The small classifier learns classes that are easy to tell apart."""

import numpy as np

from relay_jax.evaluation.classifier import train_classifier


def coloured(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy 8 px images whose brightest channel is their class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    images = 0.3 * rng.normal(size=(count, 8, 8, 3)) - 0.5
    images[np.arange(count), :, :, labels] += 1
    return images.astype(np.float32), labels.astype(np.int32)


def test_classes_that_are_easy_to_tell_apart_are_learned() -> None:
    images, labels = coloured(192, 0)
    classify = train_classifier(images, labels, 3, epochs=10, batch=32)
    unseen, wanted = coloured(300, 1)  # more than one batch of predictions
    got = classify(unseen)
    assert got.shape == (300,)
    assert np.mean(got == wanted) > 0.98
