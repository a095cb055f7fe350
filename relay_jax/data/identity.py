"""Whether a data set is still the one it was: class names, and hashes of names and sizes.

An identity is plain values, kept in the workdir and in the
description of a packed set:

    images    how many
    parts     a row per class, in the order of their numbers (one without a name for a set
              without labels): name, images, and hashes of the files' names below the class,
              of their sizes or checksums, of the bytes of some, and of all where that was
              asked for
    content   a hash of all of it, for a short comparison

Nothing in it depends on where the set lies or on times of
files: a copy elsewhere is the same set. A renamed class is
recognised by its files.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from relay_jax.data.source import Source
from relay_jax.errors import DataError, one_line
from relay_jax.runtime.counting import counting
from relay_jax.runtime.files import digest, file_sha256

Identity = dict[str, Any]
Part = dict[str, Any]

# Each size is a request to the file system: a million of them
# take minutes on a remote disk. Of larger sets so many files
# are looked at, and the first bytes of some: noise has the same
# size in every PNG.
SIZES, SAMPLED = 100_000, 1000
HEAD = 1 << 16  # bytes of a sampled file
THREADS = 16
LISTED = 3  # differences that are named; the others are counted
# What says that two classes hold the same files, wherever it is
# known of both.
_FILES = ("names", "sizes", "samples", "contents")


def identify(source: Source, contents: bool = False) -> Identity:
    """The identity of a set. Raises DataError.

    contents: hash the bytes of the
    files, too, which reads all of them.
    """
    parts: list[Part] = [{"name": name} for name in class_names(source) or [""]]
    counts = source.class_counts() if source.num_classes else [len(source)]
    if counts is not None:
        for part, count in zip(parts, counts, strict=True):
            part["images"] = count
    labels = source.known_labels() if source.num_classes else np.zeros(len(source), np.int64)
    named = labels is not None and bool(source.file_name(0))
    if labels is not None and named:
        order = np.argsort(labels, kind="stable")
        rows = np.split(order, np.cumsum(np.bincount(labels, minlength=len(parts)))[:-1])
        _hash_files(source, parts, rows, contents)
    # The bytes are left out: with and
    # without them it is the same set.
    listing = [{key: part[key] for key in part if key != "contents"} for part in parts]
    content = digest([len(source), listing, "" if named else source.identity()])
    return {"images": len(source), "parts": parts, "content": content}


def class_names(source: Source) -> list[str]:
    """The names of all classes, their numbers where a source has none; empty without labels."""
    return list(source.class_names) or [str(number) for number in range(source.num_classes)]


def _hash_files(
    source: Source,
    parts: Sequence[Part],
    rows: Sequence[np.ndarray],
    contents: bool,
) -> None:
    """Adds the hashes of names, sizes and contents to each part."""
    sized_each, sampled_each = (max(most // len(parts), 1) for most in (SIZES, SAMPLED))
    counts = [len(members) for members in rows]
    looks = sum(min(n, sized_each) + min(n, sampled_each) + n * contents for n in counts)
    with ThreadPoolExecutor(THREADS) as pool, counting("looking at the data", looks) as add:

        def each(look: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
            for value in pool.map(look, items):
                add(1)
                yield value

        for part, members in zip(parts, rows, strict=True):
            positions = members.tolist()
            names = [_below(source.file_name(position), part["name"]) for position in positions]
            sized = _some(names, sized_each)
            sampled = _some(names, sampled_each)
            # Sorted by name: whatever the order of a class, the
            # files are the same.
            part["names"] = _short(sorted(names))
            sizes = each(source.file_stamp, [positions[n] for n in sized])
            part["sizes"] = _short(sorted(zip([names[n] for n in sized], sizes, strict=True)))
            heads = each(partial(_sha256, HEAD), [source.where(positions[n]) for n in sampled])
            part["samples"] = _short(sorted(zip([names[n] for n in sampled], heads, strict=True)))
            if contents:
                paths = [source.where(position) for position in positions]
                part["contents"] = _short(
                    sorted(zip(names, each(partial(_sha256, 0), paths), strict=True))
                )


def _some(names: Sequence[str], most: int) -> list[int]:
    """Which of the files of a class are looked at: always the same ones of the same names."""
    # By a hash of the name: what is added to another class must not
    # change the choice.
    if len(names) <= most:
        return list(range(len(names)))
    order = sorted(
        range(len(names)),
        key=lambda n: (zlib.crc32(os.fsencode(names[n])), names[n]),
    )
    return order[:most]


def _below(name: str, class_name: str) -> str:
    """A file's path below the folder of its class, so that a renamed folder has the same files."""
    name = name.replace("\\", "/")
    return name.removeprefix(f"{class_name}/")


def _short(value: Sequence[Any]) -> str:
    # Half of a SHA-256 is enough where nobody attacks, and a
    # thousand classes have three thousand of them.
    sha = hashlib.sha256()
    for item in value:
        # Names need not be valid Unicode: what the file system calls
        # them is what counts.
        sha.update(repr(item).encode("utf-8", "surrogateescape") + b"\n")
    return sha.hexdigest()[:32]


def _sha256(most: int, path: str) -> str:
    """Of so many bytes of a file, 0 for all. Raises DataError."""
    # The members of a zip have a checksum in its listing already,
    # and are no files of their own.
    if not os.path.isfile(path):
        return ""
    try:
        if not most:
            return file_sha256(path)
        with open(path, "rb") as file:
            return hashlib.sha256(file.read(most)).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error


def summary(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of an identity: enough to refuse other data, and the class names.

    "content" is '' where it is not known: of weights that were one
    file (weights/unpack.py).
    """
    names = [part["name"] for part in identity["parts"]]
    return {
        "images": identity["images"],
        "class_names": names if any(names) else [],
        "content": identity["content"],
    }


def from_summary(kept: Mapping[str, Any]) -> Identity:
    """An identity that can be compared, of a `summary`."""
    parts = [{"name": name} for name in kept["class_names"] or [""]]
    return {"images": kept["images"], "parts": parts, "content": kept["content"]}


def changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs between two identities, in a few words; '' for the same set, wherever it is.

    What only one of them knows, such as the bytes of the files, is
    not compared.
    """
    before = {part["name"]: part for part in old["parts"]}
    after = {part["name"]: part for part in new["parts"]}
    if ("" in before) != ("" in after):
        had, has = (0 if "" in names else len(names) for names in (before, after))
        return f"it has {has} classes instead of {had}"
    missing = [name for name in before if name not in after]
    fresh = [name for name in after if name not in before]
    differences: list[str] = []
    for name in missing:
        twin = next(
            (other for other in fresh if _same_files(before[name], after[other])),
            None,
        )
        if twin is None:
            differences.append(f"class {_quoted(name)}{_count(before[name])} is gone")
        else:
            fresh.remove(twin)
            differences.append(f"class {_quoted(name)} is called {_quoted(twin)} now")
    differences += [f"class {_quoted(name)}{_count(after[name])} is new" for name in fresh]
    # Numbers follow from names: a class that was renamed or added
    # moves the others, and their labels would silently mean
    # something else.
    numbers = {name: number for number, name in enumerate(after)}
    moved = [
        f"class {_quoted(name)} was number {number} and is {numbers[name]}"
        for number, name in enumerate(before)
        if name in numbers and numbers[name] != number
    ]
    common = [_difference(before[name], after[name]) for name in before if name in after]
    differences += moved + [text for text in common if text]
    if not differences and old["images"] != new["images"]:
        differences.append(f"it has {new['images']:,} images instead of {old['images']:,}")
    # Two sets whose rows agree as far as both have them.
    contents = {old["content"], new["content"]} - {""}
    if not differences and len(contents) > 1:
        differences.append("its images are others")
    rest = (
        f", and {len(differences) - LISTED} more differences" if len(differences) > LISTED else ""
    )
    return "; ".join(differences[:LISTED]) + rest


def _same_files(one: Part, other: Part) -> bool:
    shared = [key for key in _FILES if key in one and key in other]
    return bool(shared) and all(one[key] == other[key] for key in shared)


def _difference(old: Part, new: Part) -> str:
    """What differs between the files of one class, '' if nothing does."""
    where = f"class {_quoted(old['name'])}" if old["name"] else "it"
    if "images" in old and "images" in new and old["images"] != new["images"]:
        return f"{where} has {new['images']:,} images instead of {old['images']:,}"
    for key, text in (
        ("names", "has images of other names"),
        ("sizes", "has files of other sizes"),
        ("contents", "has files of other contents"),
        ("samples", "has files of other contents"),
    ):
        if key in old and key in new and old[key] != new[key]:
            return f"{where} {text}"
    return ""


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 40 else f"{name[:37]}...")


def _count(part: Part) -> str:
    return f" ({part['images']:,} images)" if "images" in part else ""
