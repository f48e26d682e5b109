"""A hospital's own task, all of it: what the columns of a CSV mean, and a torch model. Every hospital has the same file."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from fednats import Examples, Task
from fednats.data.table import Category, Classes, Number, Table

# Number: mean and scale are what is usual in the field, not your own; low and high are what is possible.
# indicator=True lets a value be missing, impute=60 puts 60 in its place; without either it is refused.
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
        """Two layers; any torch model may stand here, if its shape does not depend on your data."""
        return nn.Sequential(nn.Linear(PATIENTS.n_features, 16), nn.ReLU(), nn.Linear(16, PATIENTS.n_outputs))

    def train_data(self) -> Examples:
        """Four patients in five, the same ones in every run."""
        train, _ = PATIENTS.read(self.csv, self.csv_format).split()
        return train

    def test_data(self) -> Examples:
        """The others."""
        _, test = PATIENTS.read(self.csv, self.csv_format).split()
        return test
