"""Local training at one site: some optimiser steps from the global weights, and the delta they make."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader

from fednats.codec.layout import Vector
from fednats.config import TrainingSettings
from fednats.errors import ConfigError, LocalDataError
from fednats.learning.flat import initial_model, read_vector, write_vector
from fednats.learning.task import Examples, Task


@dataclass(frozen=True)
class LocalPass:
    """What one local pass was."""

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


def load_optimizers() -> None:
    """Make one step of nothing: torch loads a large part of itself at the first, seconds that are no training."""
    nothing = nn.Parameter(torch.zeros(1))
    nothing.grad = torch.zeros(1)
    optim.SGD([nothing], 0.0).step()


class Trainer:
    """Holds a site's task and training data between passes; a pass depends on nothing that ran before it.

    The model is lent: whoever made it may use it for something else between passes.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task = task
        self._data = task.train_data()
        self.n_samples = _length(self._data)
        if not self.n_samples:
            raise ConfigError(f"{type(task).__name__}: train_data() is empty; a site needs at least one case")
        self._model = model
        entries = model.state_dict().items()
        self._fresh = {name: value.clone() for name, value in entries if not value.is_floating_point()}

    def train(self, start: Vector, settings: TrainingSettings, seed: int) -> LocalPass:
        """Take ``settings.local_steps`` steps from ``start`` float32[n], reshuffling the data every epoch.

        Every batch has ``batch_size`` cases, or all of them where the site has fewer; an epoch's rest is left out.
        Random augmentation and dropout that draw from torch's generator are seeded too. The model holds the result.

        Raises:
            LocalDataError: the loss is not finite, or ``start`` is not of the model's size.
        """
        with self._from(start, seed):
            train_loss = self._steps(settings, seed)
        self._model.zero_grad()  # a gradient is as large as the model, and what follows needs none
        return LocalPass(n_samples=self.n_samples, train_loss=train_loss)

    @contextmanager
    def _from(self, start: Vector, seed: int) -> Iterator[None]:
        """Begin with the weights ``start``; dropout and augmentation follow from ``seed``."""
        self._model.load_state_dict(self._fresh, strict=False)
        write_vector(self._model, start)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield

    def _steps(self, settings: TrainingSettings, seed: int) -> float:
        if settings.dp is not None:
            raise ConfigError("training.dp: this trainer adds no noise; fednats.privacy.trainer.PrivateTrainer does")
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


def train(task: Task, weights: NDArray[np.float32], settings: TrainingSettings, seed: int) -> NDArray[np.float32]:
    """Return the delta float32[n] of one pass; see `Trainer.train`."""
    model = initial_model(task, seed=0)
    Trainer(task, model).train(weights, settings, seed)
    return read_vector(model) - weights


def _length(data: Examples) -> int:
    return len(data)  # type: ignore[arg-type]  # torch's Dataset declares no __len__
