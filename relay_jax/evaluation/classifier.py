"""A classifier trained on real images: does a generated image show the class that was asked for?

A linear layer on the features of a trained network; a small
convolutional network where the features are random ones. A check for
data sets without a standard classifier, and for the demo. Not a
published metric.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from relay_jax.data.images import to_float
from relay_jax.data.loader import read
from relay_jax.data.source import Source, draw_balanced
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.resolution import Resolution
from relay_jax.runtime.counting import counted
from relay_jax.sampling.pixels import to_uint8
from relay_jax.stage import Stage

TRAINING_IMAGES, HELD_OUT_IMAGES = 4096, 1024
PREDICTED = 256  # images classified at a time
RIDGE = 1e-2  # relative to the mean variance of a feature


class _ConvNet(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (24, 48, 96):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            # Maximum of 2 x 2 pixels by a reshape: the gradient of
            # nn.max_pool is slow on CPU.
            b, h, w, c = x.shape
            even = x[:, : h // 2 * 2, : w // 2 * 2]
            x = even.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class Classifier:
    """Trained on images [n, h, w, 3] in [-1, 1] and labels int [n] when it is made.

    Called with images [m, h, w, 3] it
    returns their classes, int [m].
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        num_classes: int,
        *,
        epochs: int = 6,
        batch: int = 32,
        seed: int = 0,
    ) -> None:
        self._network = _ConvNet(num_classes)
        # Without a mesh: every process trains the same classifier on
        # one of its devices, which takes seconds.
        self._predict = jax.jit(self._classes)
        schedule = optax.cosine_decay_schedule(3e-3, epochs * (len(images) // batch))
        optimizer = optax.adam(schedule)
        params = self._network.init(jax.random.key(seed), images[:1])
        opt_state = optimizer.init(params)
        step = jax.jit(partial(self._step, optimizer))
        rng = np.random.default_rng(seed)
        for _ in counted(range(epochs), "training the classifier", epochs, "epochs"):
            order = rng.permutation(len(images))
            # The incomplete last batch is left out: it would be
            # compiled once more.
            for start in range(0, len(images) - batch + 1, batch):
                rows = order[start : start + batch]
                params, opt_state = step(params, opt_state, images[rows], labels[rows])
        self._params = params

    def _loss(self, params: dict, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = self._network.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def _step(
        self,
        optimizer: optax.GradientTransformation,
        params: dict,
        opt_state: optax.OptState,
        images: jax.Array,
        labels: jax.Array,
    ) -> tuple[dict, optax.OptState]:
        gradient = jax.grad(self._loss)(params, images, labels)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return optax.apply_updates(params, updates), opt_state

    def _classes(self, params: dict, images: jax.Array) -> jax.Array:
        return jnp.argmax(self._network.apply(params, images), axis=-1)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        parts = [images[start : start + PREDICTED] for start in range(0, len(images), PREDICTED)]
        return np.concatenate([np.asarray(self._predict(self._params, part)) for part in parts])


class LinearProbe:
    """A linear layer on features [n, d], fitted to them and labels int [n] when it is made.

    Ridge regression to the classes as unit vectors. Called with features [m, d] it returns their
    classes, int [m].
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, num_classes: int) -> None:
        rows = features.astype(np.float64)
        self._mean = rows.mean(0)
        rows -= self._mean
        covariance = rows.T @ rows / len(rows)
        ridge = RIDGE * np.trace(covariance) / len(covariance)
        targets = np.eye(num_classes)[labels] - 1 / num_classes
        right = rows.T @ targets / len(rows)
        self._weights = np.linalg.solve(covariance + ridge * np.eye(len(covariance)), right)

    def __call__(self, features: np.ndarray) -> np.ndarray:
        return np.argmax((features - self._mean) @ self._weights, axis=-1)


def class_accuracies(
    source: Source,
    images: Mapping[str, np.ndarray],
    classes: np.ndarray,
    resolution: Resolution,
    extractor: FeatureExtractor,
    rows: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> dict[str, float]:
    """Share of the images that a classifier trained on real ones gives the class asked for.

    images: by name, float [n, h, w, 3], about [-1, 1];
    classes: int [n]. extractor: whose features it sees, if they
    are not random ones. rows: features of the images, [n, d] by
    name, where they are known. Adds "_real": held-out real images, the
    ceiling.
    """
    # All classes equally often in either part: most sets are sorted
    # by class, and the first images would be those of one.
    positions = draw_balanced(source, TRAINING_IMAGES + HELD_OUT_IMAGES, 0).tolist()
    held_out = len(positions) // 5
    pixels, labels = read(source, positions, resolution)
    # Through 8 bits, as the real images have come: the classifier
    # must not see the difference.
    sets = {name: to_uint8(x) for name, x in images.items()}
    sets |= {"_real": pixels[:held_out], "_shown": pixels[held_out:]}
    if extractor.is_trained:
        seen = {n: rows[n] if n in rows else extractor(x)["pool"] for n, x in sets.items()}
    else:
        seen = {name: to_float(x) for name, x in sets.items()}
    kind = LinearProbe if extractor.is_trained else Classifier
    classify = kind(seen.pop("_shown"), labels[held_out:], source.num_classes)
    expected = dict.fromkeys(images, classes) | {"_real": labels[:held_out]}
    return {
        name: round(float(np.mean(classify(x) == expected[name])), 4) for name, x in seen.items()
    }


def about_classifier(extractor: FeatureExtractor) -> str:
    """What class_accuracy is, for the notes of a report."""
    kind = "a small classifier"
    if extractor.is_trained:
        kind = f"a linear layer on the features of {extractor.name}"
    return (
        f"class_accuracy: share of the samples that {kind}, trained on real images, gives the "
        "class that was asked for"
    )


def class_check(
    source: Source,
    stages: Sequence[Stage],
    images: Mapping[str, np.ndarray],
    classes: np.ndarray,
    extractor: FeatureExtractor,
) -> dict[str, float]:
    """Class accuracies of a relay's samples, of the first stage's enlarged, and of real images.

    images: of the first and last stage by name,
    float32 [n, h, w, 3]; classes: int [n].
    """
    first, last = stages[0], stages[-1]
    factor = last.image_shape[0] // first.image_shape[0]
    # Enlarged without the later stages: what those add to the class
    # is the difference.
    upsampled = images[first.name].repeat(factor, axis=1).repeat(factor, axis=2)
    sets = {"": images[last.name], "_upsampled": upsampled}
    accuracies = class_accuracies(source, sets, classes, last.resolution, extractor)
    return {f"class_accuracy{name}": value for name, value in accuracies.items()}
