"""A model's inputs: one tensor, several in order, or several by name."""

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

from fednats.learning.outputs import shape_of

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""Inputs of a batch, as PyTorch's `default_collate` returns them."""


def predict(model: nn.Module, inputs: Inputs) -> Any:
    """Call the model with ``inputs``: ``model(x)``, ``model(*several)`` or ``model(**by_name)``."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    """Apply ``change`` to each tensor."""
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: each(value, change) for name, value in inputs.items()}
    return tuple(each(value, change) for value in inputs)


def described(values: object) -> str:
    """Describe tensors by shape and dtype.

    >>> import torch
    >>> described((torch.zeros(8, 3), {"age": torch.zeros(8)}))
    '(float32[n, 3], {age: float32[n]})'
    """
    if isinstance(values, Mapping):
        return f"{{{', '.join(f'{name}: {described(value)}' for name, value in values.items())}}}"
    if isinstance(values, tuple | list):
        return f"({', '.join(map(described, values))})"
    return shape_of(values)
