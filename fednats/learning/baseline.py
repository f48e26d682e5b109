"""Baselines for a federation: each hospital alone, and the data of all hospitals pooled."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import ConcatDataset

from fednats.config import TrainingSettings
from fednats.learning.flat import initial_vector, read_vector
from fednats.learning.task import Examples, Task
from fednats.learning.trainer import trained


class PooledTask(Task):
    """Several hospitals' data pooled, learned as the first hospital's task.

    ``evaluate(PooledTask(tasks), weights, seed=seed)`` scores all hospitals' test cases together.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = tuple(tasks)
        self._first = self._tasks[0]

    def model(self) -> nn.Module:
        """The first task's model."""
        return self._first.model()

    def train_data(self) -> Examples:
        """All training data, one hospital after the other."""
        return ConcatDataset([task.train_data() for task in self._tasks])

    def test_data(self) -> Examples:
        """All test data, one hospital after the other."""
        return ConcatDataset([task.test_data() for task in self._tasks])

    def loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """The first task's loss."""
        return self._first.loss(model, inputs, targets)

    def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        """The first task's metrics."""
        return self._first.metrics(scores, targets)

    @property
    def has_own_metrics(self) -> bool:
        """Whether the first task has metrics of its own."""
        return self._first.has_own_metrics


def train_alone(task: Task, settings: TrainingSettings, n_steps: int, seed: int) -> NDArray[np.float32]:
    """Return the weights float32[n] after ``n_steps`` steps without a federation, from the initial weights of ``seed``.

    Model, optimiser and batch size are those of the federation; give the number of steps that a site takes in it. There
    is no early stopping, so the test data influences no choice. No noise is added, since nothing leaves the hospital.
    """
    alone = settings.model_copy(update={"local_steps": n_steps, "dp": None})
    return read_vector(trained(task, initial_vector(task, seed), alone, seed))
