"""A model's tensors as one flat float32 vector."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fednats.errors import Reason, RefusedError
from fednats.messages import ParameterSpec

BLOCK_VALUES = 2**18
"""Values processed at a time (1 MiB), so working memory does not grow with the model."""


class Vector(Protocol):
    """float32[n], in memory or read in parts from a file. A numpy array is a `Vector`."""

    def __len__(self) -> int:
        """Return n."""

    def __getitem__(self, part: slice, /) -> NDArray[np.float32]:
        """Return values ``part.start`` to ``part.stop``."""


class Difference:
    """One vector minus another, float32[n], computed when it is read.

    >>> Difference(np.float32([3, 5]), np.float32([1, 1]))[0:2].tolist()
    [2.0, 4.0]
    """

    def __init__(self, minuend: Vector, subtrahend: Vector) -> None:
        self._minuend = minuend
        self._subtrahend = subtrahend

    def __len__(self) -> int:
        return len(self._subtrahend)

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """Return values ``part.start`` to ``part.stop``."""
        return self._minuend[part] - self._subtrahend[part]


def blocks(n: int, size: int = BLOCK_VALUES) -> Iterator[slice]:
    """Cut ``n`` values into blocks of ``size``.

    >>> list(blocks(5, 2))
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None)]
    """
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class Layout:
    """Where each tensor lies in the flat vector.

    >>> layout = Layout((ParameterSpec(name="weight", shape=(2, 3)), ParameterSpec(name="bias", shape=(2,))))
    >>> layout.n_parameters, layout.slices[1]
    (8, slice(6, 8, None))
    >>> layout.steps((0.5, 0.25), 5, 8).tolist()
    [0.5, 0.25, 0.25]
    >>> layout.means(np.float32([1, 1, 1, 3, 3, 3, -5, 5]), np.abs).tolist()
    [2.0, 5.0]
    """

    def __init__(self, parameters: Sequence[ParameterSpec]) -> None:
        self.parameters = tuple(parameters)
        sizes = [math.prod(parameter.shape) for parameter in self.parameters]
        ends = np.cumsum(sizes, dtype=np.int64)
        self._sizes = np.array(sizes, dtype=np.int64)
        self._ends = ends
        self.n_parameters = sum(sizes)
        self.statistics = tuple(parameter.statistic for parameter in self.parameters)
        """For each tensor, whether it is a running statistic."""
        self.slices = tuple(slice(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True))

    def steps(self, of_tensors: Sequence[float], start: int, stop: int) -> NDArray[np.float32]:
        """Return the quantisation step of each value of the flat vector in ``start:stop``, float32[stop - start].

        Raises:
            RefusedError: ``wrong_grid``: not one step per tensor, or a step that is not a positive normal float32.
        """
        if len(of_tensors) != len(self.parameters):
            raise RefusedError(Reason.WRONG_GRID, f"{len(of_tensors)} steps for {len(self.parameters)} tensors")
        steps = np.asarray(of_tensors, dtype=np.float64)
        limits = np.finfo(np.float32)
        if not ((steps >= limits.tiny) & (steps <= limits.max)).all():
            raise RefusedError(Reason.WRONG_GRID, "a step is not a positive float32")
        return np.repeat(steps.astype(np.float32), self._lengths(start, stop))

    def of_statistics(self, start: int, stop: int) -> NDArray[np.bool_]:
        """Mark the running statistics among the values ``start:stop`` of the flat vector, bool[stop - start]."""
        return np.repeat(np.array(self.statistics, np.bool_), self._lengths(start, stop))

    def _lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """Count each tensor's values between ``start`` and ``stop``, int64[n_tensors]."""
        lengths: NDArray[np.int64] = np.minimum(self._ends, stop) - np.maximum(self._ends - self._sizes, start)
        return np.maximum(lengths, 0, out=lengths)

    def means(
        self, vector: Vector, function: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    ) -> NDArray[np.float64]:
        """Return the mean of ``function(values)`` per tensor, float64[n_tensors]; 0 for a tensor without values."""
        sums = np.zeros(len(self._sizes))
        for block in blocks(self.n_parameters):
            running = np.concatenate(([0.0], np.cumsum(function(vector[block]), dtype=np.float64)))
            low, high = (
                np.clip(ends - block.start, 0, running.size - 1) for ends in (self._ends - self._sizes, self._ends)
            )
            sums += running[high] - running[low]
        return sums / np.maximum(self._sizes, 1)
