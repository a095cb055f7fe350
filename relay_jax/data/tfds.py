"""Images of a TFDS data set that the user has prepared on this machine, read without TensorFlow.

Needs array_record (or parquet) files: TFDS's default, tfrecord, can
only be read by TensorFlow. The data set is looked up by its folder,
DATA_DIR/NAME[/CONFIG]/VERSION, and not through its registered
builder: building that may import TensorFlow and ask the network,
while the folder says all that is needed. Nothing is ever downloaded.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from relay_jax.data.files import read_file, refusing, several
from relay_jax.data.images import EncodedImages
from relay_jax.errors import DataError, one_line
from relay_jax.runtime.counting import counting
from relay_jax.runtime.files import MAX_TEXT, digest, parse_json

_OWN_CLASSES = "tensorflow_datasets.core.features."
# Keys under which features.json has the
# name of a class: TFDS reads all of them.
_CLASS_KEYS = {"pythonClassName", "python_class_name", "type"}
_VERSION = re.compile(r"\d+\.\d+\.\d+")


class TfdsSource(EncodedImages):
    """A split (slices such as "train[:90%]" too) of a prepared TFDS data set.

    The features must hold `image`; a ClassLabel named `label` gives
    the classes, otherwise there are no labels. An empty `data_dir`
    means $TFDS_DATA_DIR, or ~/tensorflow_datasets.
    """

    config_keys: ClassVar[tuple[str, ...]] = ("name", "split", "data_dir")

    def __init__(self, name: str, split: str, data_dir: str = "") -> None:
        """Raises DataError for a set that is not prepared, or cannot be read without TensorFlow."""
        folder = _find(name, data_dir)
        try:
            import tensorflow_datasets as tfds
        except ImportError as error:
            raise DataError(
                f"the tfds source misses a package ({error}); run: pip install tensorflow_datasets"
            ) from error
        _check_features(folder)
        try:
            builder = tfds.builder_from_directory(folder)
            features = dict(builder.info.features.items())
            label = features.get("label")
            splits = several(builder.info.splits)
        # Protobuf's parser, for one, has
        # an exception class of its own.
        except Exception as error:
            raise DataError(
                f"{folder}: cannot be read as a TFDS data set ({one_line(error, 160)}); prepare it "
                "again"
            ) from error
        if "image" not in features:
            raise DataError(
                f"{folder}: this data set has no feature named image, only {several(features)}"
            )
        try:
            # We decode ourselves: TFDS switches decoders where
            # OpenCV is installed, and leaves grey and CMYK alone.
            decoders = {"image": tfds.decode.SkipDecoding()}
            # One call, which looks at every file.
            with counting(f"opening {name}"):
                self._records: Sequence[Mapping[str, Any]] = builder.as_data_source(
                    split, decoders=decoders
                )
                self._length = len(self._records)
        except NotImplementedError as error:
            raise DataError(
                f"{folder}: holds {builder.info.file_format.value} files, which need TensorFlow; "
                "prepare it again with file_format='array_record'"
            ) from error
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise DataError(
                f"{folder}: cannot read split {split!r} ({one_line(error, 160)}); it has {splits}"
            ) from error
        if not self._length:
            raise DataError(f"{folder}: split {split!r} is empty; it has {splits}")
        self._folder, self._split = folder, split
        self._about = {
            "source": "tfds",
            "name": name,
            "split": split,
            "data_dir": data_dir,
        }
        classes = label if isinstance(label, tfds.features.ClassLabel) else None
        self.num_classes = (classes.num_classes or 0) if classes else 0
        self.class_names = tuple(classes.names) if classes and self.num_classes else ()

    def __len__(self) -> int:
        return self._length

    def where(self, position: int) -> str:
        """The folder, the split and the position."""
        return f"{self._folder}:{self._split}[{position}]"

    def fingerprint(self) -> str:
        """Hash of the name, the split and the number of images."""
        return digest([self._about, len(self)])

    def identity(self) -> str:
        """As the fingerprint, without the folder that the set lies in."""
        about = {key: value for key, value in self._about.items() if key != "data_dir"}
        return digest([about, len(self)])

    def encoded(self, position: int) -> tuple[bytes, str, int]:
        where = self.where(position)
        with refusing(f"{where}: cannot be read", "; prepare the data set again"):
            record = self._records[position]
            data, label = (
                record["image"],
                int(record["label"]) if self.num_classes else 0,
            )
        # TFDS writes -1 in splits without
        # labels, such as ImageNet's test.
        if not 0 <= label < max(self.num_classes, 1):
            raise DataError(
                f"{where}: has the label {label}, which means none; choose a labelled split"
            )
        if not isinstance(data, bytes):
            raise DataError(
                f"{where}: the image is stored as {type(data).__name__}, not as an encoded file"
            )
        return data, where, label


def _check_features(folder: Path) -> None:
    """Raises DataError for a features.json with classes that are not TFDS's own."""
    # TFDS imports the module that such a name begins with: one that
    # lies in the current folder would run.
    file = folder / "features.json"
    with refusing(f"{file}: cannot be read"):
        nodes = [parse_json(read_file(file, MAX_TEXT).decode())] if file.exists() else []
        while nodes:
            node = nodes.pop()
            if isinstance(node, dict):
                for key in _CLASS_KEYS & node.keys():
                    _check_class(file, node[key])
                # Earlier versions keep JSON in a text.
                inner = node.get("json")
                if isinstance(inner, str) and inner.lstrip().startswith(("{", "[")):
                    nodes.append(parse_json(inner))
            nodes += node.values() if isinstance(node, dict) else []
            nodes += node if isinstance(node, list) else []


def _check_class(file: Path, name: object) -> None:
    # A name without a dot is none of a module.
    if isinstance(name, str) and "." in name and not name.startswith(_OWN_CLASSES):
        raise DataError(
            f"{file}: names the class {several([name])}, which is not TFDS's own: code of the data "
            "set would run; prepare it with TFDS's own features"
        )


def _versions(folder: Path) -> list[Path]:
    """The prepared versions in `folder`, oldest first: x.y.z with a dataset_info.json."""
    if not folder.is_dir():
        return []
    named = [path for path in folder.iterdir() if _VERSION.fullmatch(path.name)]
    prepared = [path for path in named if (path / "dataset_info.json").is_file()]
    # As numbers: 1.10.0 is newer than 1.9.0.
    return sorted(
        prepared,
        key=lambda path: tuple(int(number) for number in path.name.split(".")),
    )


def _find(name: str, data_dir: str) -> Path:
    """Folder of the newest prepared version of `name`: "set" or "set/config", also ":1.2.3"."""
    root = Path(data_dir or os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()
    base, _, version = name.partition(":")
    if not base:
        raise DataError(
            "the tfds source needs the name of a data set, such as imagenet2012 or celeb_a_hq/256"
        )
    configs = [_versions(root / base)]
    # Without a configuration in the name
    # the only prepared one is meant.
    if not configs[0] and (root / base).is_dir():
        configs = [
            versions
            for path in sorted((root / base).iterdir())
            if path.is_dir() and (versions := _versions(path))
        ]
    if len(configs) > 1:
        choices = several(f"{base}/{versions[0].parent.name}" for versions in configs)
        raise DataError(
            f"{root / base}: several configurations are prepared; name one of {choices}"
        )
    prepared = [path for path in (configs[0] if configs else []) if version in ("", path.name)]
    if not prepared:
        raise DataError(
            f'{root / base}: no prepared TFDS data set {name}; run: python -c "import '
            "tensorflow_datasets as tfds; "
            f"tfds.builder('{name}', data_dir='{root}', "
            "file_format='array_record').download_and_prepare()\"; "
            "preparing may need tensorflow, training does not"
        )
    return prepared[-1]
