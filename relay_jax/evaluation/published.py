"""Statistics of Inception features as others publish them: mean and covariance by output.

npz    ADM: `mu`, `sigma` (pool) and `mu_s`, `sigma_s` (spatial); EDM: `mu`, `sigma`
pkl    EDM2: {"fid": {"mu": ..., "sigma": ...}, ...}, read by official/pickle.py, which
       runs nothing of it
"""

import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from relay_jax.data.files import read_file, refusing, several
from relay_jax.data.npz import read_array
from relay_jax.errors import DataError
from relay_jax.official.pickle import Machine, Name, Record

Statistics = dict[str, tuple[np.ndarray, np.ndarray]]
_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_TYPES = ("f4", "f8", "i4", "i8")


def read_npz(path: Path) -> tuple[list[str], Statistics]:
    """The keys of an npz, and the statistics among its arrays. Raises DataError."""
    with (
        refusing(f"{path}: not a readable npz file"),
        zipfile.ZipFile(path) as archive,
    ):
        keys = sorted(name.removesuffix(".npy") for name in archive.namelist())
        statistics = {
            name: (
                read_array(archive, f"{mean}.npy").astype(np.float64),
                read_array(archive, f"{cov}.npy").astype(np.float64),
            )
            for name, (mean, cov) in _KEYS.items()
            if {mean, cov} <= set(keys)
        }
    for name, pair in statistics.items():
        _check(path, " and ".join(_KEYS[name]), *pair)
    return keys, statistics


def read_pickle(path: Path) -> Statistics:
    """The Inception statistics of a pickled dictionary of EDM2. Raises DataError."""
    with refusing(f"{path}: not a readable file of statistics"):
        value = Machine(memoryview(read_file(path)), _NAMES).run()
        # EDM2 has a dictionary for each kind of features.
        inner = value.get("fid", value) if isinstance(value, dict) else None
        if not isinstance(inner, dict):
            raise DataError(f"{path}: holds no dictionary of statistics")
        if not {"mu", "sigma"} <= inner.keys():
            raise DataError(
                f"{path}: holds no statistics of Inception (fid: mu and sigma) but "
                f"{several(map(str, inner))}"
            )
        mean, cov = (_array(inner[key]).astype(np.float64) for key in ("mu", "sigma"))
    _check(path, "mu and sigma", mean, cov)
    return {"pool": (mean, cov)}


def _check(path: Path, names: str, mean: np.ndarray, cov: np.ndarray) -> None:
    """Raises DataError for what is no mean and covariance."""
    if (
        mean.ndim != 1
        or cov.shape != mean.shape * 2
        or not (np.isfinite(mean).all() and np.isfinite(cov).all())
    ):
        raise DataError(
            f"{path}: {names} are no mean and covariance ({list(mean.shape[:6])}, "
            f"{list(cov.shape[:6])})"
        )


# NumPy's arrays as its pickles of all protocols have them. Each name
# does what is here and nothing else.


class _Dtype(Record):
    """class_name: such as f8; state[1]: the order of bytes."""


class _Array(Record):
    """state: version, shape, type, whether in Fortran order, bytes."""


def _dtype(_: Machine, args: tuple) -> _Dtype:
    if not args or args[0] not in _TYPES:
        raise ValueError("an array of another type than numbers")
    return _Dtype(args[0])


def _reconstruct(_: Machine, args: tuple) -> _Array:
    return _Array("array")


def _from_buffer(_: Machine, args: tuple) -> _Array:
    data, dtype, shape, order = args
    return _Array("array", (1, shape, dtype, order == "F", data))


def _encoded(_: Machine, args: tuple) -> memoryview:
    # Protocol 2 writes bytes as a text.
    text, encoding = args
    if encoding != "latin1":
        raise ValueError("a text of another encoding")
    return memoryview(text.encode("latin1"))


def _array(value: Any) -> np.ndarray:
    """Raises ValueError for what is no array of numbers."""
    match value:
        case _Array(state=(_, tuple(shape), _Dtype(class_name=code) as dtype, fortran, data)):
            order = (dtype.state or (3, "<"))[1]
            flat = np.frombuffer(data, (">" if order == ">" else "<") + code)
            if all(type(n) is int and n >= 0 for n in shape) and math.prod(shape) == flat.size:
                return flat.reshape(shape, order="F" if fortran else "C")
    raise ValueError("it holds no arrays of numbers")


_NAMES = {
    "numpy.ndarray": Name("numpy.ndarray"),
    "numpy.dtype": Name("numpy.dtype", _dtype),
    "_codecs.encode": Name("_codecs.encode", _encoded),
}
for _core in ("numpy.core", "numpy._core"):
    for _name, _call in (
        ("multiarray._reconstruct", _reconstruct),
        ("numeric._frombuffer", _from_buffer),
    ):
        _NAMES[f"{_core}.{_name}"] = Name(f"{_core}.{_name}", _call)
