"""Batches of a data set's cases, in the form a model takes. Samples are collated only here.

A sample is ``(input, target)``. The input is a tensor, a tuple or list of tensors for a model with several inputs, or a
dict for a model that takes them by name. PyTorch's `default_collate` joins samples. Floating-point values get the dtype
of the model's parameters.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from fednats.errors import ConfigError, TaskError
from fednats.learning.inputs import Inputs, described, each
from fednats.learning.task import Examples, Task

Batch: TypeAlias = tuple[Inputs, Tensor]

EXPECTED = (
    "expected (input, target): the input a tensor, a tuple of tensors for several inputs, or a dict of them by name of"
    " the model's argument; the target a tensor or a number"
)


class Batches(Dataset[tuple[Any, ...]]):
    """Batches for ``model`` of the cases in ``data``, which a task's method ``name`` returned.

    Raises:
        ConfigError: there is no case, or the first is not an ``(input, target)`` that can be put into a batch.
    """

    def __init__(self, task: Task, name: str, data: Examples, model: nn.Module) -> None:
        self._where = f"{type(task).__name__}: {name}()"
        self._data = data
        self._dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.get_default_dtype())
        try:
            self._n = len(data)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
        except TypeError:
            raise ConfigError(
                f"{self._where} is a {type(data).__name__} without a length; give a data set with len() and [index]"
            ) from None
        if not self._n:
            raise ConfigError(f"{self._where} is empty; a site needs at least one case")
        self.of([0])

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self._data[index]

    def of(self, indices: Sequence[int]) -> Batch:
        """Return the cases ``indices`` as a batch."""
        return self._batch([self._data[index] for index in indices])

    def loader(self, batch_size: int, **how: Any) -> Iterator[Batch]:
        """Yield all cases once in batches; ``how`` goes to torch's `DataLoader`."""
        yield from DataLoader(self, batch_size, collate_fn=self._batch, **how)

    def _batch(self, samples: Sequence[Any]) -> Batch:
        first = samples[0]
        if not isinstance(first, tuple | list) or len(first) != 2:  # noqa: PLR2004 - input and target
            raise ConfigError(f"{self._where} gives {_kind(first)}; {EXPECTED}")
        try:
            inputs, targets = default_collate(list(samples))
        except (TypeError, RuntimeError) as error:
            raise TaskError(
                f"{self._where}: its cases cannot be put into a batch: {error}", public="cases do not make a batch"
            ) from None
        found = list(_tensors(inputs))
        if not found or not all(isinstance(one, Tensor) for one in (*found, targets)):
            raise ConfigError(f"{self._where} gives {_kind(first)}; {EXPECTED}")
        return each(inputs, self._cast), self._cast(targets)

    def _cast(self, values: Tensor) -> Tensor:
        return values.to(self._dtype) if values.is_floating_point() else values


def loss_of(task: Task, model: nn.Module, inputs: Inputs, targets: Tensor) -> Tensor:
    """Return the task's mean loss of a batch, a scalar tensor.

    Raises:
        TaskError: the loss is not a scalar tensor, or does not depend on the model's parameters.
    """
    try:
        loss = task.loss(model, inputs, targets)
    except Exception as error:
        error.add_note(f"The batch's inputs are {described(inputs)}, its targets {described(targets)}.")
        raise
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise TaskError(
            f"loss() returned {described(loss)}, expected the mean loss of the batch, a tensor with one value: does it end"
            " in `return`?",
            public="loss() returned no tensor with one value",
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise TaskError(
            "loss() returned a value that does not depend on the parameters; leave out item(), detach() and no_grad()",
            public="loss() does not depend on the parameters",
        )
    return loss


def _kind(sample: object) -> str:
    """Describe a sample without its values."""
    if isinstance(sample, Mapping):
        return f"a dict with {', '.join(map(str, sample))}"
    if isinstance(sample, tuple | list):
        return f"{len(sample)} parts ({', '.join(type(part).__name__ for part in sample)})"
    return f"a {type(sample).__name__}"


def _tensors(inputs: object) -> Iterator[object]:
    if isinstance(inputs, Mapping):
        inputs = tuple(inputs.values())
    if isinstance(inputs, tuple | list):
        for one in inputs:
            yield from _tensors(one)
    else:
        yield inputs
