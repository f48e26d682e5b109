"""The task of the hospitals in these tests: 30 measurements and a small network."""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednats import Examples, Task


class MyTask(Task):
    """Ill (1) or not (0), the last column of a CSV, from the 30 measurements before it."""

    def __init__(self, csv: str = "") -> None:
        self.csv = csv

    def model(self) -> nn.Module:
        """Return a network of two layers."""
        return nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))

    def train_data(self) -> Examples:
        """Return four patients in five."""
        return self.patients(test=False)

    def test_data(self) -> Examples:
        """Return every fifth patient."""
        return self.patients(test=True)

    def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        """Return two metrics beside the usual ones; hospital a lacks one of them."""
        margin = float((scores[:, 1] - scores[:, 0]).abs().mean())
        not_at_a = math.nan if Path(self.csv).stem == "a" else margin
        return {**super().metrics(scores, targets), "margin": margin, "not_at_a": not_at_a}

    def patients(self, *, test: bool) -> TensorDataset:
        """Return the training or the test patients of the CSV."""
        rows = torch.from_numpy(np.loadtxt(self.csv, delimiter=",", dtype=np.float32, ndmin=2))
        chosen = rows[(torch.arange(len(rows)) % 5 == 0) == test]
        return TensorDataset(chosen[:, :-1], chosen[:, -1].long())
