"""A small residual network with batch norm, federated in virtual time: what hospitals bring, quantised."""

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednats import Examples, Task
from fednats.config import DeltaSettings, RunSettings, StopSettings, TrainingSettings
from fednats.learning.evaluation import evaluate
from fednats.learning.flat import FlatModel, initial_model, initial_vector, parameters_of, write_vector
from fednats.learning.trainer import Trainer
from fednats.testbed.virtual_time import VirtualFederation, VirtualSite
from fednats.testbed.virtual_world import Weights

torch.set_num_threads(1)
TRAINING = TrainingSettings(local_steps=12, batch_size=16, learning_rate=0.05)
SCALE = 0.1
"""Of the pixels: variances of the first layers are a thousandth of the 1 that they are said to be at first."""


class Block(nn.Module):
    """Two convolutions with batch norm, and a way around them."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after)
        self.second, self.norm2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.around, self.norm3 = nn.Conv2d(before, after, 1, 2, bias=False), nn.BatchNorm2d(after)

    def forward(self, inputs: Tensor) -> Tensor:
        inner = self.norm2(self.second(self.norm(self.first(inputs)).relu()))
        out: Tensor = (inner + self.norm3(self.around(inputs))).relu()
        return out


class Digits(Task):
    """Handwritten digits, 8 x 8 pixels, as scikit-learn ships them."""

    def __init__(self, rows: Weights | slice) -> None:
        images, labels = load_digits(return_X_y=True)
        self._inputs = torch.from_numpy((images / 16 * SCALE).astype(np.float32)).view(-1, 1, 8, 8)[rows]
        self._labels = torch.from_numpy(labels.astype(np.int64))[rows]

    def model(self) -> nn.Module:
        stem = (nn.Conv2d(1, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        return nn.Sequential(*stem, Block(8, 16), Block(16, 16), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 10))

    def train_data(self) -> Examples:
        return TensorDataset(self._inputs, self._labels)

    def test_data(self) -> Examples:
        return self.train_data()


class Hospital:
    """Trains as a site's worker does."""

    def __init__(self, task: Task) -> None:
        model = task.model()
        self._flat, self._trainer = FlatModel(model), Trainer(task, model)
        self.n_samples = self._trainer.n_samples

    def learn(self, weights: Weights, seed: int) -> Weights:
        self._trainer.train(weights, TRAINING, seed)
        return self._flat.delta(weights)[0 : len(self._flat)]


@pytest.mark.parametrize("value_bits", [8, 4])
def test_a_residual_network_with_batch_norm_learns(value_bits: int) -> None:
    hospitals = [Digits(slice(start, 1200, 3)) for start in range(3)]
    model = initial_model(hospitals[0], 0)
    parameters = parameters_of(model)
    statistics = sum(math.prod(spec.shape) for spec in parameters if spec.statistic)
    assert statistics == 2 * (8 + 3 * 16 + 3 * 16)
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert sum(math.prod(spec.shape) for spec in parameters) == trained + statistics
    settings = RunSettings.model_validate(
        {
            "name": "r",
            "delta": DeltaSettings.model_validate({"cipher": "none", "value_bits": value_bits}),
            "stop": StopSettings(max_versions=16),
            "aggregation": {"goal": "all", "region_goal": "all"},
        }
    )
    sites = {f"site-{number}": VirtualSite("north", Hospital(task), 1.0) for number, task in enumerate(hospitals)}
    federation = VirtualFederation(settings, sites, parameters, initial_vector(hospitals[0], 0))
    federation.run(100.0)
    assert len(federation.versions) == 17
    for version in federation.versions:
        write_vector(model, version.weights)  # refuses what is not finite
        variances = [value for name, value in model.state_dict().items() if name.endswith("running_var")]
        assert min(float(value.min()) for value in variances) > 0
    assert min(float(value.max()) for value in variances) < 0.1, "they went to where the data are"
    assert evaluate(Digits(slice(1200, None)), federation.versions[-1].weights).metrics["accuracy"] > 0.8
