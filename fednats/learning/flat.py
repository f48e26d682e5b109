"""A model as one flat float32 vector, in the order of its state dict.

The vector holds every floating-point entry: parameters and float buffers (running means). Integer entries (step
counters) and non-persistent buffers stay local: they are neither sent nor received.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fednats.errors import LocalDataError
from fednats.learning.task import Task
from fednats.messages import ParameterSpec


def parameters_of(model: nn.Module) -> tuple[ParameterSpec, ...]:
    """Name and shape of every tensor in the flat vector, in its order.

    >>> [(p.name, p.shape) for p in parameters_of(nn.Linear(3, 2))]
    [('weight', (2, 3)), ('bias', (2,))]
    """
    return tuple(ParameterSpec(name=name, shape=tuple(tensor.shape)) for name, tensor in _entries(model))


def read_vector(model: nn.Module) -> NDArray[np.float32]:
    """Copy the model's floating-point entries into one vector, float32[n]."""
    parts = [tensor.detach().to("cpu", torch.float32).reshape(-1) for _, tensor in _entries(model)]
    if not parts:
        raise LocalDataError("the model has no floating-point parameters; there is nothing to train")
    vector: NDArray[np.float32] = torch.cat(parts).numpy()
    return vector


def write_vector(model: nn.Module, vector: NDArray[np.float32]) -> None:
    """Copy ``vector`` float32[n] into the model, in place.

    Raises:
        LocalDataError: the vector's length is not the model's.
    """
    tensors = [tensor for _, tensor in _entries(model)]
    expected = sum(tensor.numel() for tensor in tensors)
    if vector.shape != (expected,):
        raise LocalDataError(f"vector of shape {vector.shape} for a model of {expected} values; another task's?")
    values = torch.tensor(vector, dtype=torch.float32)
    with torch.no_grad():
        for tensor, part in zip(tensors, torch.split(values, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))


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
