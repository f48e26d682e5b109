"""A model as one flat float32 vector, in the order of its state dict.

The vector holds every floating-point entry: parameters and float buffers (running means). Integer entries (step
counters) and non-persistent buffers stay local: they are neither sent nor received.
"""

from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fednats.codec.layout import Vector, blocks
from fednats.errors import LocalDataError
from fednats.learning.task import Task
from fednats.messages import ParameterSpec


def parameters_of(model: nn.Module) -> tuple[ParameterSpec, ...]:
    """Name and shape of every tensor in the flat vector, in its order.

    >>> [(p.name, p.shape) for p in parameters_of(nn.Linear(3, 2))]
    [('weight', (2, 3)), ('bias', (2,))]
    """
    return tuple(ParameterSpec(name=name, shape=tuple(tensor.shape)) for name, tensor in _entries(model))


class FlatModel:
    """The floating-point entries of a model as one float32 vector, read and written part by part.

    >>> flat = FlatModel(nn.Linear(1, 2))
    >>> flat.write(1, np.float32([2.0, 3.0]))
    >>> len(flat), flat[1:3].tolist()
    (4, [2.0, 3.0])
    """

    def __init__(self, model: nn.Module) -> None:
        self._tensors = [tensor for _, tensor in _entries(model)]
        self._ends = list(accumulate(tensor.numel() for tensor in self._tensors))
        if not self._ends or not self._ends[-1]:
            raise LocalDataError("the model has no floating-point parameters; there is nothing to train")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """Copy values ``part.start`` to ``part.stop``."""
        values = np.empty(part.stop - part.start, np.float32)
        for tensor, inside, outside in self._overlaps(part.start, part.stop):
            values[outside] = tensor.detach().reshape(-1)[inside].to("cpu", torch.float32).numpy()
        return values

    def write(self, start: int, values: NDArray[np.float32]) -> None:
        """Copy ``values`` float32[m] into the model from value ``start`` on."""
        with torch.no_grad():
            for tensor, inside, outside in self._overlaps(start, start + len(values)):
                flat = tensor.reshape(-1)
                flat[inside] = torch.tensor(values[outside], dtype=tensor.dtype, device=tensor.device)
                if flat.data_ptr() != tensor.data_ptr():  # not contiguous: what was written is a copy
                    tensor.copy_(flat.view(tensor.shape))

    def _overlaps(self, start: int, stop: int) -> Iterator[tuple[Tensor, slice, slice]]:
        """Yield each tensor that has values of ``start`` to ``stop``, which of its own, and where they lie in the part."""
        for index in range(bisect_right(self._ends, start), len(self._tensors)):
            tensor = self._tensors[index]
            first = self._ends[index] - tensor.numel()
            low, high = max(start, first), min(stop, self._ends[index])
            if first >= stop:
                return
            if low < high:
                yield tensor, slice(low - first, high - first), slice(low - start, high - start)


def read_vector(model: nn.Module) -> NDArray[np.float32]:
    """Copy the model's floating-point entries into one vector, float32[n]."""
    flat = FlatModel(model)
    return flat[0 : len(flat)]


def write_vector(model: nn.Module, vector: Vector) -> None:
    """Copy ``vector`` float32[n] into the model, in place, block by block.

    Raises:
        LocalDataError: the vector's length is not the model's.
    """
    flat = FlatModel(model)
    if len(vector) != len(flat):
        raise LocalDataError(f"a vector of {len(vector)} values for a model of {len(flat)}; another task's?")
    for block in blocks(len(flat)):
        flat.write(block.start, vector[block])


def initial_model(task: Task, seed: int) -> nn.Module:
    """Build the task's model; its weights are the same for the same seed, and torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return task.model()


def initial_vector(task: Task, seed: int) -> NDArray[np.float32]:
    """Weights of `initial_model`, float32[n]."""
    return read_vector(initial_model(task, seed))


def _entries(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, tensor) for name, tensor in model.state_dict().items() if tensor.is_floating_point()]
