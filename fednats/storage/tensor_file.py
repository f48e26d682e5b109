"""A model on disk as safetensors, read and written in parts, so that it is never in memory as a whole."""

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from fednats.codec.layout import Vector, blocks
from fednats.errors import ConfigError
from fednats.messages import DIGEST_BYTES, MAX_COUNT, MAX_DIMENSIONS

_VALUE_BYTES = 4
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 8 * 2**20  # the size limit of a manifest, which names the same tensors


class TensorFile:
    """float32 tensors in a safetensors file as one flat vector, in file order.

    ``file[a:b]`` reads values ``a`` to ``b`` of the vector, ``file.write(a, values)`` writes them. Open a file with
    `read`, or make one with `create`. It is a context manager.
    """

    def __init__(
        self,
        path: Path,
        descriptor: int,
        start: int,
        tensors: Sequence[tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self.path = path
        self.metadata = metadata
        self.tensors = list(tensors)
        """Name and shape of each tensor."""
        self._descriptor = descriptor
        self._start = start
        self._n_values = sum(math.prod(shape) for _, shape in tensors)

    @classmethod
    def create(cls, path: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Self:
        """Create a file of zeros with these names and shapes."""
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        n_values = 0
        for name, shape in tensors:
            stop = n_values + math.prod(shape)
            offsets = [n_values * _VALUE_BYTES, stop * _VALUE_BYTES]
            header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
            n_values = stop
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.pwrite(descriptor, _LENGTH.pack(len(text)) + text, 0)
        start = _LENGTH.size + len(text)
        os.truncate(descriptor, start + n_values * _VALUE_BYTES)
        return cls(path, descriptor, start, tensors, metadata)

    @classmethod
    def read(cls, path: Path) -> Self:
        """Open a file for reading.

        Raises:
            ConfigError: the file is missing or damaged.
        """
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise _unusable(path, error.strerror or "no such file") from error
        try:
            start, tensors, metadata = _parse(descriptor)
        except (ValueError, KeyError, TypeError, RecursionError, struct.error) as error:
            os.close(descriptor)
            raise _unusable(path, str(error)) from error
        return cls(path, descriptor, start, tensors, metadata)

    def __len__(self) -> int:
        return self._n_values

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """Read values ``part.start`` to ``part.stop``."""
        values = np.empty(part.stop - part.start, "<f4")
        view = values.view(np.uint8).data
        done = 0
        while done < len(view):
            n_bytes = os.preadv(self._descriptor, [view[done:]], self._start + part.start * _VALUE_BYTES + done)
            if n_bytes == 0:
                raise _unusable(self.path, f"it ends before value {part.stop}")
            done += n_bytes
        return values

    def write(self, start: int, values: NDArray[np.float32]) -> None:
        """Write ``values`` (float32[n]) at position ``start``."""
        view = np.ascontiguousarray(values, "<f4").view(np.uint8).data
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], self._start + start * _VALUE_BYTES + done)

    def sync(self) -> None:
        """Return when everything written is on disk."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def digest_of(weights: Vector) -> bytes:
    """Return the BLAKE2b-128 digest of ``weights`` as float32, little endian, as announced in manifests."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for block in blocks(len(weights)):
        digest.update(weights[block].tobytes())
    return digest.digest()


def sync_folder(folder: Path) -> None:
    """Return when renames and removals in ``folder`` are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _parse(descriptor: int) -> tuple[int, list[tuple[str, tuple[int, ...]]], Mapping[str, str]]:
    (length,) = _LENGTH.unpack(os.pread(descriptor, _LENGTH.size, 0))
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(os.pread(descriptor, length, _LENGTH.size))
    if not isinstance(header, dict):
        raise TypeError("its header is not an object")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise ValueError("its metadata are not texts")
    n_values = 0
    tensors = []
    for name, entry in header.items():
        if entry["dtype"] != "F32":
            raise ValueError("it holds other types than float32")
        stop = n_values + _size(entry["shape"])
        if entry["data_offsets"] != [n_values * _VALUE_BYTES, stop * _VALUE_BYTES]:
            raise ValueError("its tensors do not lie one after the other")
        n_values = stop
        tensors.append((name, tuple(entry["shape"])))
    start = _LENGTH.size + length
    if os.fstat(descriptor).st_size != start + n_values * _VALUE_BYTES:
        raise ValueError(f"it should hold {n_values} values and is not of that size")
    return start, tensors, metadata


def _size(shape: object) -> int:
    """Return the number of values of a tensor of ``shape``."""
    if not (isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS):
        raise ValueError("a tensor has no shape")
    if not all(type(length) is int and 0 <= length <= MAX_COUNT for length in shape):
        raise ValueError("a tensor's shape is not of whole numbers")
    return math.prod(shape)


def _unusable(path: Path, why: str) -> ConfigError:
    return ConfigError(f"{path}: cannot be read as a model ({why}); restore it or remove it")
