"""Local training at one site: some optimiser steps from the global weights, and the resulting delta."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn, optim

from fednats.codec.layout import Vector
from fednats.config import TrainingSettings
from fednats.errors import ConfigError, LocalDataError, TaskError
from fednats.learning.batches import Batch, Batches, loss_of
from fednats.learning.entries import frozen_digests, frozen_of, set_training, unlike
from fednats.learning.flat import FlatModel, initial_model, write_vector
from fednats.learning.task import Task


@dataclass(frozen=True)
class LocalPass:
    """Figures of one local pass."""

    n_samples: int
    """Size of the site's training data."""
    train_loss: float
    """Mean loss over the pass's batches; with DP-SGD, over the cases drawn."""


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _sgd(model: nn.Module, settings: TrainingSettings) -> optim.Optimizer:
    return optim.SGD(
        _trainable(model), settings.learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay
    )


def _adam(model: nn.Module, settings: TrainingSettings) -> optim.Optimizer:
    return optim.Adam(_trainable(model), settings.learning_rate, weight_decay=settings.weight_decay)


def _adamw(model: nn.Module, settings: TrainingSettings) -> optim.Optimizer:
    return optim.AdamW(_trainable(model), settings.learning_rate, weight_decay=settings.weight_decay)


OPTIMIZERS: Mapping[str, Callable[[nn.Module, TrainingSettings], optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
}


def load_optimizers() -> None:
    """Take an empty step: at the first step torch loads a large part of itself, which takes seconds."""
    nothing = nn.Parameter(torch.zeros(1))
    nothing.grad = torch.zeros(1)
    optim.SGD([nothing], 0.0).step()


class Trainer:
    """Holds a site's task and training data between passes; a pass does not depend on earlier ones.

    The model is lent: its owner may use it for something else between passes.
    """

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task = task
        self.examples = task.train_data()
        self._cases = Batches(task, "train_data", self.examples, model)
        self.n_samples = len(self._cases)
        self.lend(model)

    def lend(self, model: nn.Module) -> None:
        """Train ``model`` from now on; its frozen tensors must stay as they are now."""
        self._model = model
        frozen = frozen_of(model).items()
        self._frozen = frozen_digests(model)
        self._fresh = {name: value.clone() for name, value in frozen if not isinstance(value, nn.Parameter)}

    def train(self, start: Vector, settings: TrainingSettings, seed: int) -> LocalPass:
        """Take ``settings.local_steps`` steps from ``start`` float32[n], reshuffling the data every epoch.

        Every batch has ``batch_size`` cases, or all cases if the site has fewer; the rest of an epoch is left out.
        Random augmentation and dropout that draw from torch's generator are seeded too. The model holds the result; its
        step counters and other frozen buffers are as before.

        Raises:
            LocalDataError: the loss is not finite, or ``start`` does not have the model's size.
            RefusedError: ``start`` has a value that the model cannot hold (`FlatModel.check`).
            TaskError: training changed a frozen floating-point tensor, or BatchNorm would get batches of one case.
        """
        with self._from(start, seed):
            train_loss = self._steps(settings, seed)
        self._model.zero_grad()  # gradients are as large as the model, and nothing needs them now
        return LocalPass(n_samples=self.n_samples, train_loss=train_loss)

    def parameters_without_gradient(self, settings: TrainingSettings) -> list[str]:
        """Train on one batch, discard the result, and name the trainable parameters that got no gradient.

        Raises:
            LocalDataError: the loss is not finite.
        """
        state = self._model.state_dict()
        before = {name: state[name].clone() for name, _ in self._model.named_buffers() if name in state}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            set_training(self._model)
            inputs, targets = next(self._batches(settings.batch_size, seed=0))
            loss = loss_of(self._task, self._model, inputs, targets)
            if not math.isfinite(loss.item()):
                raise LocalDataError(
                    f"loss of the first batch is {loss.item()}; is a value of the data not finite?",
                    public="the loss is not finite",
                )
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            named = list(self._model.named_parameters())
            unused = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
        self._model.zero_grad()
        self._model.load_state_dict(before, strict=False)  # undo what the batch did to buffers such as BatchNorm's
        return unused

    @contextmanager
    def _from(self, start: Vector, seed: int) -> Iterator[None]:
        """Start from weights ``start``; dropout and augmentation follow from ``seed``. Raises TaskError as `train`."""
        self._restore()
        write_vector(self._model, start)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
        self._refuse_moved()

    def _restore(self) -> None:
        self._model.load_state_dict(self._fresh, strict=False)

    def _refuse_moved(self) -> None:
        """Refuse a pass that changed tensors which other sites do not get; counters may change and are reset."""
        for name, tensor in frozen_of(self._model).items():
            if name in self._fresh and not tensor.is_floating_point():
                tensor.copy_(self._fresh[name])
        moved = unlike(list(frozen_of(self._model)), frozen_digests(self._model), self._frozen)
        if moved:
            self._restore()
            text = (
                f"training changed what does not travel, {moved} from the one that model() made: make it a parameter; derive"
                " a layer that gathers statistics from torch's BatchNorm; give scratch space persistent=False"
            )
            raise TaskError(text, public=text)

    def _steps(self, settings: TrainingSettings, seed: int) -> float:
        if settings.dp is not None:
            raise ConfigError("training.dp: this trainer adds no noise; fednats.privacy.trainer.PrivateTrainer does")
        set_training(self._model)
        optimizer = OPTIMIZERS[settings.optimizer](self._model, settings)
        batches = self._batches(settings.batch_size, seed)
        total = 0.0
        for step in range(1, settings.local_steps + 1):
            inputs, targets = next(batches)
            optimizer.zero_grad()
            loss = loss_of(self._task, self._model, inputs, targets)
            value = loss.item()
            if not math.isfinite(value):
                raise LocalDataError(
                    f"loss is {value} at step {step} of {settings.local_steps}; lower the learning rate?",
                    public="the loss is not finite",
                )
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            optimizer.step()
            total += value
        return total / settings.local_steps

    def _batches(self, batch_size: int, seed: int) -> Iterator[Batch]:
        size = min(batch_size, self.n_samples)
        if size == 1 and (name := needs_two(self._model)):
            raise TaskError(
                f"{name} is a BatchNorm over cases, and cannot train on batches of one: batch_size is {batch_size}, the site has"
                f" {self.n_samples} cases; use nn.GroupNorm or nn.LayerNorm, or larger batches",
                public="BatchNorm on batches of one case",
            )
        generator = torch.Generator().manual_seed(seed)
        while True:
            yield from self._cases.loader(size, shuffle=True, drop_last=True, generator=generator)


def needs_two(model: nn.Module) -> str:
    """Return the name of a BatchNorm layer that cannot train on a batch of one case; empty if there is none."""
    kinds = (nn.BatchNorm1d, nn.LazyBatchNorm1d)
    return next((name or "the model" for name, layer in model.named_modules() if isinstance(layer, kinds)), "")


def train(task: Task, weights: NDArray[np.float32], settings: TrainingSettings, seed: int) -> NDArray[np.float32]:
    """Return the delta float32[n] of one pass; see `Trainer.train`. Frozen tensors are made from ``seed`` too."""
    flat = FlatModel(trained(task, weights, settings, seed))
    return flat.delta(weights)[0 : len(flat)]


def trained(task: Task, weights: NDArray[np.float32], settings: TrainingSettings, seed: int) -> nn.Module:
    """Return the model after one pass from ``weights`` float32[n], as `train`."""
    model = initial_model(task, seed)
    Trainer(task, model).train(weights, settings, seed)
    return model
