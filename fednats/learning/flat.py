"""A model's travelling tensors (`fednats.learning.entries`) as one flat float32 vector, in state-dict order."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fednats.codec.layout import Vector, blocks
from fednats.errors import LocalDataError, Reason, RefusedError
from fednats.learning.entries import StateEntry, entries_of
from fednats.learning.task import Task
from fednats.messages import ParameterSpec

LARGEST = 1e15
"""Largest possible magnitude of a value; squares of float32 overflow soon above it."""

LARGEST_LOG = 80.0
"""Largest possible magnitude of a variance's logarithm; exp overflows float32 at 88."""


def parameters_of(model: nn.Module) -> tuple[ParameterSpec, ...]:
    """Return name and shape of every tensor in the flat vector, in order.

    >>> [(p.name, p.shape) for p in parameters_of(nn.Linear(3, 2))]
    [('weight', (2, 3)), ('bias', (2,))]

    Raises:
        ConfigError: as `entries_of`.
    """
    return tuple(
        ParameterSpec(name=entry.name, shape=tuple(entry.tensor.shape), statistic=entry.statistic)
        for entry in entries_of(model)
    )


class FlatModel:
    """The travelling tensors of a model as one float32 vector, read and written part by part.

    >>> flat = FlatModel(nn.Linear(1, 2))
    >>> flat.write(1, np.float32([2.0, 3.0]))
    >>> len(flat), flat[1:3].tolist()
    (4, [2.0, 3.0])
    """

    def __init__(self, model: nn.Module) -> None:
        self._entries = entries_of(model)
        self._ends = list(accumulate(entry.tensor.numel() for entry in self._entries))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """Copy values ``part.start`` to ``part.stop``."""
        values = np.empty(part.stop - part.start, np.float32)
        for entry, inside, outside in self._overlaps(part.start, part.stop):
            values[outside] = entry.encoded(entry.tensor.detach().reshape(-1)[inside])
        return values

    def write(self, start: int, values: NDArray[np.float32]) -> None:
        """Copy ``values`` float32[m] into the model from value ``start`` on.

        Raises:
            RefusedError: ``not_finite``, as `check`.
        """
        with torch.no_grad():
            for entry, inside, outside in self._overlaps(start, start + len(values)):
                tensor, held = entry.tensor, _possible(entry, values[outside])
                flat = tensor.reshape(-1)
                flat[inside] = held.to(tensor.device)
                if flat.data_ptr() != tensor.data_ptr():  # not contiguous: reshape made a copy
                    tensor.copy_(flat.view(tensor.shape))

    def check(self, start: int, values: NDArray[np.float32]) -> None:
        """Refuse ``values`` float32[m], from value ``start`` on, that the model cannot hold; does not change the model.

        Raises:
            RefusedError: ``not_finite``, naming the tensor: a value is not finite, above `LARGEST`, or overflows the
                tensor's dtype; or a variance is impossible.
        """
        for entry, _, outside in self._overlaps(start, start + len(values)):
            _possible(entry, values[outside])

    def hollow(self) -> "FlatModel":
        """Return a copy without values, which takes no memory and can only `check`."""
        hollow = FlatModel.__new__(FlatModel)
        hollow._ends = self._ends  # noqa: SLF001 - its own
        hollow._entries = tuple(  # noqa: SLF001 - its own
            replace(entry, tensor=torch.empty_like(entry.tensor, device="meta")) for entry in self._entries
        )
        return hollow

    def delta(self, start: Vector) -> Vector:
        """Return the change by training since ``start`` float32[n] was written, float32[n], computed when it is read.

        It is relative to ``start`` as the model held it: in a bfloat16 model, rounding ``start`` is not training.
        """
        return _Delta(self, start)

    def moved(self, part: slice, start: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the delta of values ``part.start`` to ``part.stop`` since ``start``, float32[m], was written there."""
        delta = np.empty(part.stop - part.start, np.float32)
        for entry, inside, outside in self._overlaps(part.start, part.stop):
            now = entry.encoded(entry.tensor.detach().reshape(-1)[inside])
            delta[outside] = entry.moved(now, entry.encoded(entry.decoded(start[outside])))
        return delta

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[StateEntry, slice, slice]]:
        """Yield each tensor with values in ``start:stop``, their slice of the tensor, and their slice of the part."""
        for index in range(bisect_right(self._ends, start), len(self._entries)):
            entry = self._entries[index]
            first = self._ends[index] - entry.tensor.numel()
            low, high = max(start, first), min(stop, self._ends[index])
            if first >= stop:
                return
            if low < high:
                yield entry, slice(low - first, high - first), slice(low - start, high - start)


class _Delta:
    def __init__(self, model: FlatModel, start: Vector) -> None:
        self._model = model
        self._start = start

    def __len__(self) -> int:
        return len(self._start)

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        return self._model.moved(part, self._start[part])


def _possible(entry: StateEntry, values: NDArray[np.float32]) -> torch.Tensor:
    """Return the tensor values for ``values``. Raises as `FlatModel.check`."""
    held = entry.decoded(values)
    if not bool(torch.isfinite(held).all()):
        raise RefusedError(
            Reason.NOT_FINITE,
            f"{entry.name} has a value that is not finite in {_type_of(entry)}; lower learning rates?",
        )
    magnitude = float(np.abs(values).max(initial=0.0))
    if magnitude > LARGEST:
        raise RefusedError(Reason.NOT_FINITE, f"{entry.name} has a value of {magnitude:.3g}; lower learning rates?")
    if entry.eps is not None and magnitude > LARGEST_LOG:
        raise RefusedError(
            Reason.NOT_FINITE, f"{entry.name} is {magnitude:.3g}, no logarithm of a variance; lower learning rates?"
        )
    return held


def _type_of(entry: StateEntry) -> str:
    return str(entry.tensor.dtype).removeprefix("torch.")


def read_vector(model: nn.Module) -> NDArray[np.float32]:
    """Copy the model's travelling tensors into one vector, float32[n]."""
    flat = FlatModel(model)
    return flat[0 : len(flat)]


def write_vector(model: nn.Module, vector: Vector) -> None:
    """Copy ``vector`` float32[n] into the model, in place, block by block.

    Raises:
        LocalDataError: the vector does not have the model's size.
        RefusedError: ``not_finite``, as `FlatModel.check`.
    """
    flat = FlatModel(model)
    if len(vector) != len(flat):
        raise LocalDataError(f"a vector of {len(vector)} values for a model of {len(flat)}; another task's?")
    for block in blocks(len(flat)):
        flat.write(block.start, vector[block])


def initial_model(task: Task, seed: int) -> nn.Module:
    """Build the task's model, the same for the same seed; torch's generator keeps its state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.model()


def initial_vector(task: Task, seed: int) -> NDArray[np.float32]:
    """Return the flat vector of `initial_model`, float32[n]."""
    return read_vector(initial_model(task, seed))
