"""Local training at one site: some optimiser steps from the global weights, and the delta they make."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from fednats.config import TrainingSettings
from fednats.errors import ConfigError, LocalDataError
from fednats.learning.flat import initial_model, read_vector, write_vector
from fednats.learning.task import Examples, Task


@dataclass(frozen=True)
class LocalResult:
    """What one local pass made."""

    delta: NDArray[np.float32]
    """float32[n], local minus global weights."""
    n_samples: int
    """Size of the site's training data."""
    train_loss: float
    """Mean loss over the pass's batches."""


def _sgd(model: nn.Module, settings: TrainingSettings) -> optim.Optimizer:
    return optim.SGD(
        model.parameters(), settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def _adam(model: nn.Module, settings: TrainingSettings) -> optim.Optimizer:
    return optim.Adam(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)


def _adamw(model: nn.Module, settings: TrainingSettings) -> optim.Optimizer:
    return optim.AdamW(model.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)


OPTIMIZERS: Mapping[str, Callable[[nn.Module, TrainingSettings], optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
}


class Trainer:
    """Holds a site's task, model and training data between passes; a pass depends on nothing that ran before it."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._data = task.train_data()
        self.n_samples = _length(self._data)
        if not self.n_samples:
            raise ConfigError(f"{type(task).__name__}: train_data() is empty; a site needs at least one case")
        self._model = initial_model(task, seed=0)
        self._fresh = copy.deepcopy(self._model.state_dict())

    def train(self, weights: NDArray[np.float32], settings: TrainingSettings, seed: int) -> LocalResult:
        """Take ``settings.local_steps`` steps from ``weights`` float32[n], reshuffling the data every epoch.

        Every batch has ``batch_size`` cases, or all of them where the site has fewer; an epoch's rest is left out.
        Random augmentation and dropout that draw from torch's generator are seeded too.

        Raises:
            LocalDataError: the loss or the delta is not finite, or ``weights`` is not of the model's size.
        """
        self._model.load_state_dict(self._fresh)
        write_vector(self._model, weights)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            train_loss = self._steps(settings, seed)
        delta = read_vector(self._model) - weights
        if not np.isfinite(delta).all():
            raise LocalDataError(
                f"delta is not finite in {np.count_nonzero(~np.isfinite(delta))} of {delta.size} values"
            )
        return LocalResult(delta=delta, n_samples=self.n_samples, train_loss=train_loss)

    def _steps(self, settings: TrainingSettings, seed: int) -> float:
        self._model.train()
        optimizer = OPTIMIZERS[settings.optimizer](self._model, settings)
        batches = self._batches(settings.batch_size, seed)
        total = 0.0
        for step in range(1, settings.local_steps + 1):
            inputs, targets = next(batches)
            optimizer.zero_grad()
            loss = self._task.loss(self._model, inputs, targets)
            value = loss.item()
            if not math.isfinite(value):
                raise LocalDataError(
                    f"loss is {value} at step {step} of {settings.local_steps}; lower the learning rate?"
                )
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            total += value
        return total / settings.local_steps

    def _batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        loader = DataLoader(
            self._data,
            batch_size=min(batch_size, self.n_samples),
            shuffle=True,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
        )
        while True:
            yield from loader


def train(task: Task, weights: NDArray[np.float32], settings: TrainingSettings, seed: int) -> LocalResult:
    """One pass on a task whose data is loaded for it; see `Trainer.train`."""
    return Trainer(task).train(weights, settings, seed)


def _length(data: Examples) -> int:
    return len(data)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
