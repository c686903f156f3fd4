"""Input data: `.npz` or `.npy` files whose keys are the names of the model's inputs."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .errors import InputError
from .runtime import Array, Arrays, InputSpec


@dataclass(frozen=True)
class Batch:
    """Inputs of one run: `size` samples, of which the first `real` are no padding."""

    feeds: Arrays
    size: int
    real: int


@dataclass(frozen=True)
class Samples:
    """Inputs of a model, one sample an entry of axis 0, whatever the model's own layout.

    arrays: by input name; scalars are given to every run as they are.
    count: number of samples.
    axes: where the model wants the batch, for inputs that want it elsewhere than on axis 0.
    fixed_batch: the batch size that the model insists on; None: any.
    """

    arrays: Arrays
    count: int
    axes: dict[str, int] = field(default_factory=dict)
    fixed_batch: int | None = None

    def batches(self, size: int) -> Iterator[Batch]:
        """The samples in batches of at most `size`, in the model's layout."""
        size = self.fixed_batch or size
        for start in range(0, self.count, size):
            real = min(size, self.count - start)
            index = np.arange(start, start + real)
            if self.fixed_batch:
                index = np.resize(index, size)
            feeds = {name: self._feed(name, array, index) for name, array in self.arrays.items()}
            yield Batch(feeds, len(index), real)

    def _feed(self, name: str, array: Array, index: Array) -> Array:
        if not array.ndim:
            return array
        return np.ascontiguousarray(np.moveaxis(array[index], 0, self.axes.get(name, 0)))

    def take(self, index: Array) -> Samples:
        """The samples at `index`."""
        arrays = {k: v[index] if v.ndim else v for k, v in self.arrays.items()}
        return Samples(arrays, len(index), self.axes, self.fixed_batch)

    def sha256(self) -> str:
        """Digest of names, types, shapes and values, whatever file they came from."""
        sha = hashlib.sha256()
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            sha.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
            sha.update(array.tobytes())
        return sha.hexdigest()


def load_arrays(path: str | Path) -> Arrays:
    """The arrays of an `.npz`, or of an `.npy` under the key "". Raises: InputError."""
    path = Path(path)
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            if not loaded.files:
                return {}
            arrays = {key: loaded[key] for key in loaded.files}
    except FileNotFoundError:
        raise InputError(f"the data file {path} does not exist") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error):
        arrays = {}
    if not arrays or not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise InputError(
            f"{path} is not a usable .npz or .npy file: write it with "
            "numpy.savez(path, **{input_name: array})"
        )
    return arrays


def load_samples(data: str | Path | Mapping[str, Array], inputs: Sequence[InputSpec]) -> Samples:
    """The samples of a file, or of arrays by name. Raises: InputError."""
    if isinstance(data, Mapping):
        return samples_from(dict(data), inputs)
    return samples_from(load_arrays(data), inputs, str(data))


def samples_from(arrays: Arrays, inputs: Sequence[InputSpec], source: str = "the data") -> Samples:
    """Check `arrays` against `inputs`; keys that are no inputs (labels, say) are left out."""
    names = [spec.name for spec in inputs]
    missing = [name for name in names if name not in arrays]
    if len(names) == 1 and len(arrays) == 1 and set(arrays) <= {"", "arr_0"}:
        arrays = {names[0]: next(iter(arrays.values()))}  # saved without a name
    elif missing:
        found = ", ".join(key for key in arrays if key) or (
            "one array without a name" if arrays else "nothing"
        )
        raise InputError(
            f"{source} has no array for the input{'s' * (len(missing) > 1)} {', '.join(missing)}: "
            f"expected the keys {', '.join(names)}, found {found}"
        )
    checked = {spec.name: _checked(arrays[spec.name], spec, source) for spec in inputs}
    counts = {name: len(array) for name, array in checked.items() if array.ndim}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(
            f"{source} has different numbers of samples on axis 0 ({listed}): give each input the "
            "same number"
        )
    count = next(iter(counts.values()), 0)
    if count == 0:
        raise InputError(f"{source} has no samples: give at least one on axis 0")
    fixed = {d for s in inputs if s.shape and isinstance(d := s.shape[s.axis], int)}
    axes = {spec.name: spec.axis for spec in inputs if spec.axis}
    return Samples(checked, count, axes, fixed.pop() if len(fixed) == 1 else None)


def _checked(array: Array, spec: InputSpec, source: str) -> Array:
    own = [d if isinstance(d, int) else str(d or "?") for d in spec.shape]
    rest = own[: spec.axis] + own[spec.axis + 1 :]
    layout = f", whose own layout is {own}" if spec.axis else ""
    wrong = InputError(
        f"{source}: the input '{spec.name}' has shape {list(array.shape)}, the model expects "
        f"{[own[spec.axis], *rest] if own else own}{layout}: give one sample an entry of axis 0"
    )
    if array.ndim != len(spec.shape):
        raise wrong
    pairs = zip(array.shape[1:], rest, strict=True) if array.ndim else ()
    if any(isinstance(d, int) and d != n for n, d in pairs):
        raise wrong
    if spec.dtype is None:
        raise InputError(
            f"the input '{spec.name}' of the model has a type that .npz files cannot hold (text or "
            "a 16-bit or smaller float): export the model with float32 or float16 inputs"
        )
    if array.dtype == spec.dtype:
        return array
    wanted = np.dtype(spec.dtype)
    same_kind = array.dtype.kind == wanted.kind or {array.dtype.kind, wanted.kind} <= {"i", "u"}
    converted = array.astype(wanted) if same_kind else array
    if not same_kind or (wanted.kind in "iu" and not np.array_equal(converted, array)):
        raise InputError(
            f"{source}: the input '{spec.name}' has type {array.dtype}, expected {wanted}: "
            f"convert it with .astype('{wanted}') after checking its scale"
        )
    return converted
