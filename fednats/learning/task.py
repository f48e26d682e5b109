"""The class that a hospital's engineer derives a task from.

::

    class MyTask(Task):
        def model(self): ...
        def train_data(self): ...
        def test_data(self): ...

`fednats.learning.task_code` finds and loads it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.utils.data import Dataset

from fednats.config import ServerSettings, TrainingSettings
from fednats.errors import ConfigError
from fednats.learning.default_loss import default_loss
from fednats.learning.default_metrics import default_metrics
from fednats.learning.inputs import predict

Examples = Dataset[tuple[Any, ...]]
"""A map-style data set: ``len(data)`` examples; ``data[i]`` is one ``(input, target)``.

The input is a tensor, a tuple of tensors for a model with several inputs, or a dict of tensors by name of the model's
argument. PyTorch's `default_collate` makes batches; floating-point values get the dtype of the model's parameters.

A data set may name the patient of each example in ``patients``, a text each, and the number of missing values in each
column in ``n_missing``; `fednats.data.cases.Cases` does.
"""


@dataclass(frozen=True)
class Recommended:
    """Settings with which a task reaches ``target`` of ``target_metric`` within ``n_versions`` model versions."""

    training: TrainingSettings = field(default_factory=TrainingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    n_versions: int = 20
    private: TrainingSettings | None = None
    """Used instead of ``training`` with differential privacy: fewer steps and larger batches, so noise costs less."""
    private_options: Mapping[str, Any] = field(default_factory=dict)
    """The task's options with differential privacy."""
    target_metric: str = "auc"
    target: float | None = None


class Task(ABC):
    """One learning problem at one hospital: a model, the hospital's data, a loss and metrics.

    The constructor takes the task's options as keyword arguments and must not read data: the coordinator, which has
    none, makes the same task and calls only `model`.
    """

    recommended: ClassVar[Recommended] = Recommended()

    @abstractmethod
    def model(self) -> nn.Module:
        """Build the model; architecture and sizes must not depend on data."""

    @abstractmethod
    def train_data(self) -> Examples:
        """Load the cases that this hospital trains on, ``(input, target)``."""

    @abstractmethod
    def test_data(self) -> Examples:
        """Load the cases that this hospital tests on; none of them may be in `train_data`."""

    def loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Return the mean loss of a batch, a scalar; ``inputs`` are a batch of `train_data`, see `Examples`.

        The default is cross entropy, by shapes: of logits [batch, classes, ...] and int64 targets [batch, ...], or of
        logits and targets 0 or 1 of the same size. It raises ConfigError for anything else.
        """
        return default_loss(predict(model, inputs), targets)

    def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        """Return figures by name for the model's outputs on all test cases; nan or left out if the cases allow none.

        The default depends on shapes; `fednats.learning.outputs` lists them. Your own method gets all outputs at once,
        so they must fit into memory.
        """
        return default_metrics(scores, targets)

    @property
    def has_own_metrics(self) -> bool:
        """Whether the task overrides `metrics`."""
        return type(self).metrics is not Task.metrics

    @classmethod
    def sites(cls, n: int, seed: int, data: Path | None = None) -> dict[str, dict[str, Any]]:
        """Split a public data set over ``n`` hospitals: constructor options by site name, fit for TOML and JSON.

        Only the testbed uses it; a hospital's own task does not need it.
        """
        raise ConfigError(f"{cls.__name__} has no ready split of {data or 'data'} over {n} hospitals (seed {seed})")
