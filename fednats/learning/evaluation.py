"""Metrics of a version of the model on test data."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fednats.codec.layout import Vector
from fednats.errors import ConfigError, LocalDataError
from fednats.learning.flat import initial_model, write_vector
from fednats.learning.scores import MAX_CLASSES, Counts
from fednats.learning.task import Task
from fednats.messages import MAX_METRIC

BATCH_SIZE = 256


@dataclass(frozen=True)
class Evaluated:
    """Metrics by name, and how many test cases they are of."""

    metrics: dict[str, float]
    n_samples: int
    counts: Counts | None
    """None if the task scores no classes: its outputs are no logits [n, classes], its targets no int64[n]."""


class Evaluator:
    """Holds a task's test data between versions; the model is lent, as a `Trainer`'s is."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task = task
        self.lend(model)
        self._loader = DataLoader(task.test_data(), batch_size=BATCH_SIZE)

    def lend(self, model: nn.Module) -> None:
        """Score with ``model`` from now on."""
        self._model = model

    def evaluate(self, weights: Vector) -> Evaluated:
        """Score every test case with ``weights`` float32[n].

        Raises:
            ConfigError: there is no test case.
            LocalDataError: a metric is not finite, or ``weights`` is not of the model's size.
            RefusedError: ``weights`` has a value that the model cannot hold (`FlatModel.check`).
        """
        write_vector(self._model, weights)
        self._model.eval()
        with torch.no_grad():  # what the model or the data keep for later, training must be able to use
            batches = [(self._model(inputs), targets) for inputs, targets in self._loader]
        if not batches:
            raise ConfigError(f"{type(self._task).__name__}: test_data() is empty; a site needs at least one test case")
        scores, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        metrics = self._task.metrics(scores, targets)
        if not (np.abs(list(metrics.values())) <= MAX_METRIC).all():
            raise LocalDataError(f"metrics are not finite, or above {MAX_METRIC:g}: {metrics}")
        return Evaluated(metrics, len(targets), _counts(scores, targets))


def _counts(scores: Tensor, targets: Tensor) -> Counts | None:
    if scores.ndim != 2 or not 2 <= scores.shape[1] <= MAX_CLASSES:  # noqa: PLR2004 - [n, classes]
        return None
    if targets.ndim != 1 or targets.is_floating_point() or not 0 <= targets.min() <= targets.max() < scores.shape[1]:
        return None
    return Counts.of(scores.double().numpy(), targets.long().numpy())


def evaluate(task: Task, weights: Vector, seed: int = 0) -> Evaluated:
    """Metrics of ``weights`` float32[n] on the task's test data; what is frozen is made from ``seed``.

    Raises as `Evaluator.evaluate`.
    """
    return Evaluator(task, initial_model(task, seed)).evaluate(weights)
