"""What a hospital's engineer writes.

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
"""A map-style data set: ``len(data)`` examples, ``data[i]`` one ``(input, target)``.

The input is a tensor, a tuple of tensors for a model with several inputs, or a dict of tensors by name of the model's
argument. PyTorch's `default_collate` makes batches of them, and floating-point values get the dtype of the model's parameters.

It may say whose its examples are with ``patients``, one text for each, and how many values are missing with ``n_missing``, a
count for each column; `fednats.data.cases.Cases` does.
"""


@dataclass(frozen=True)
class Recommended:
    """Settings with which a task reaches ``target`` of ``target_metric`` within ``n_versions`` model versions."""

    training: TrainingSettings = field(default_factory=TrainingSettings)
    server: ServerSettings = field(default_factory=ServerSettings)
    n_versions: int = 20
    private: TrainingSettings | None = None
    """Instead of ``training`` with differential privacy: fewer steps, larger batches, so that the noise costs less."""
    private_options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the task with differential privacy."""
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
        """Load what this hospital trains on: cases ``(input, target)``."""

    @abstractmethod
    def test_data(self) -> Examples:
        """Load what this hospital tests on; no case of it may be in `train_data`."""

    def loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
        """Mean loss of a batch, a scalar; ``inputs`` are a batch of what `train_data` gives, see `Examples`.

        Here cross entropy, by shapes: of logits [batch, classes, ...] and int64 targets [batch, ...], or of logits and
        targets 0 or 1 of the same size. Raises ConfigError for anything else.
        """
        return default_loss(predict(model, inputs), targets)

    def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        """Figures for the model's outputs on all test cases, by name; nan, or left out, where the cases do not allow one.

        Here by shapes: `fednats.learning.outputs` says which. A method of your own gets all outputs at once, so they must
        fit into memory.
        """
        return default_metrics(scores, targets)

    @property
    def has_own_metrics(self) -> bool:
        """Whether `metrics` is other than the default."""
        return type(self).metrics is not Task.metrics

    @classmethod
    def sites(cls, n: int, seed: int, data: Path | None = None) -> dict[str, dict[str, Any]]:
        """Share a public data set over ``n`` hospitals: constructor options by site name, fit for TOML and JSON.

        For the testbed; a hospital's own task needs none.
        """
        raise ConfigError(f"{cls.__name__} has no ready split of {data or 'data'} over {n} hospitals (seed {seed})")
