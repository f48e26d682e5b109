"""A hospital's own task, all of it: ``sites/own_task.py:MyTask`` with the option ``csv = "patients.csv"``."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fednats.data.table import Category, Classes, Number, Table
from fednats.learning.task import Examples, Task

PATIENTS = Table(
    features=(
        Number("age", mean=60, scale=15, low=0, high=120),
        Number("systolic", mean=130, scale=20, low=40, high=300),  # mmHg
        Number("creatinine", mean=1.0, scale=0.5, low=0, high=30, indicator=True),  # mg/dl; may be missing
        Category("sex", ("f", "m")),
    ),
    target=Classes("outcome", {"healthy": 0, "ill": 1}),
    patient="patient",  # all rows of a patient are either trained or tested on
)


class MyTask(Task):
    """Ill or healthy, from a few measurements."""

    def __init__(self, csv: str = "", csv_format: Mapping[str, Any] | None = None) -> None:
        self.csv, self.csv_format = csv, csv_format

    def model(self) -> nn.Module:
        """Two layers."""
        return nn.Sequential(nn.Linear(PATIENTS.n_features, 16), nn.ReLU(), nn.Linear(16, 2))

    def train_data(self) -> Examples:
        """Four patients in five."""
        train, _ = PATIENTS.read(self.csv, self.csv_format).split()
        return train

    def test_data(self) -> Examples:
        """The others."""
        _, test = PATIENTS.read(self.csv, self.csv_format).split()
        return test
