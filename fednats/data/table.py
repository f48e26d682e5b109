"""Patient tables as tensors, by a schema that a task states once for all hospitals.

::

    PATIENTS = Table(
        features=(
            Number("age", mean=60, scale=15, low=0, high=120),
            Number("crp", mean=10, scale=20, low=0, indicator=True),
            Category("sex", ("f", "m")),
        ),
        target=Classes("outcome", {"healthy": 0, "ill": 1}),
        patient="patient",
    )
    train, test = PATIENTS.read(Path("patients.csv")).split()

The encoding does not depend on the data, so a feature means the same everywhere and reveals nothing about a hospital.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fednats.data.cases import Cases
from fednats.data.column import Column
from fednats.data.csv_file import Format, read_csv
from fednats.errors import ConfigError

Features = NDArray[np.float64]


@dataclass(frozen=True)
class Number:
    """A measured value, as ``(value - mean) / scale``.

    ``mean`` and ``scale`` are usual values in the field, the same at every hospital, not a hospital's own. A missing
    value is refused, unless ``impute`` gives its replacement, or ``indicator`` adds a second feature that is 1 if the
    value is missing (the value is then ``impute``, or else ``mean``).
    """

    name: str
    mean: float = 0.0
    scale: float = 1.0
    low: float = -inf
    high: float = inf
    impute: float | None = None
    indicator: bool = False
    missing: tuple[float, ...] = ()
    """Numbers that mean a missing value in this column, such as 0 or 999."""

    def __post_init__(self) -> None:
        if not all(
            isinstance(value, int | float) for value in (self.mean, self.scale)
        ):  # `fednats task new` writes ...
            raise ConfigError(f"Number {self.name!r}: fill in mean and scale: the usual value and spread in the field")
        if not (isfinite(self.mean) and isfinite(self.scale) and self.scale):
            raise ConfigError(f"Number {self.name!r}: mean and scale must be finite, scale not 0")

    @property
    def n_features(self) -> int:
        """Number of features: 1, or 2 with an indicator."""
        return 1 + self.indicator

    @property
    def is_number(self) -> bool:
        """Whether the cells are numbers."""
        return True

    def encode(self, column: Column) -> tuple[Features, NDArray[np.bool_]]:
        """Return features float64[n, n_features], and which values are missing, bool[n]; raises DataError."""
        missing = column.is_missing()
        values = column.numbers(missing)
        missing |= np.isin(values, self.missing)
        if self.impute is None and not self.indicator:
            column.refuse(missing, "a missing value; the task says neither impute nor indicator for this column")
        values[missing] = self.mean if self.impute is None else self.impute
        within = f"{self.low:g} to {self.high:g}"
        column.refuse(~missing & ((values < self.low) | (values > self.high)), f"outside {within}; in other units?")
        scaled = (values - self.mean) / self.scale
        column.refuse(~(np.abs(scaled) < np.finfo(np.float32).max), "too large a number")
        return np.column_stack([scaled, missing][: self.n_features]), missing


@dataclass(frozen=True)
class Category:
    """One of a few stated values, as one feature per value: 1 for the value in the cell, else 0.

    Values that are all numbers are compared as numbers (1 is 1.0), others as text. A missing value is refused, unless
    ``impute`` gives its replacement among the values, or ``indicator`` lets all features be 0.
    """

    name: str
    values: Sequence[str | float]
    impute: str | float | None = None
    indicator: bool = False

    def __post_init__(self) -> None:
        _refuse_values(f"Category {self.name!r}", self.values)
        if self.impute is not None and self.impute not in self.values:
            raise ConfigError(f"Category {self.name!r}: impute is none of its values")

    @property
    def n_features(self) -> int:
        """Number of features, one per value."""
        return len(self.values)

    @property
    def is_number(self) -> bool:
        """Whether the cells are numbers."""
        return not any(isinstance(value, str) for value in self.values)

    def encode(self, column: Column) -> tuple[Features, NDArray[np.bool_]]:
        """Return features float64[n, n_features], and which values are missing, bool[n]; raises DataError."""
        missing = column.is_missing([value for value in self.values if isinstance(value, str)])
        if self.impute is None and not self.indicator:
            column.refuse(missing, "a missing value; the task says neither impute nor indicator for this column")
        codes = column.codes(self.values, missing)
        if self.impute is not None:
            codes[missing] = list(self.values).index(self.impute)
        return (codes[:, None] == np.arange(len(self.values))).astype(np.float64), missing


@dataclass(frozen=True)
class Classes:
    """The column with a case's class, and the class (0, 1, ...) for each of its values."""

    name: str
    values: Mapping[str, int] | Mapping[int, int]

    def __post_init__(self) -> None:
        _refuse_values(f"Classes {self.name!r}", list(self.values))
        classes = set(self.values.values())
        if classes != set(range(len(classes))) or len(classes) < 2:  # noqa: PLR2004 - one class is nothing to learn
            raise ConfigError(
                f"Classes {self.name!r}: the classes are {sorted(classes)}; number them from 0 without gaps"
            )

    @property
    def n_classes(self) -> int:
        """Number of different classes."""
        return len(set(self.values.values()))

    @property
    def is_number(self) -> bool:
        """Whether the cells are numbers."""
        return not any(isinstance(value, str) for value in self.values)

    def targets(self, column: Column) -> torch.Tensor:
        """Return the classes int64[n]; raises DataError."""
        missing = column.is_missing([value for value in self.values if isinstance(value, str)])
        column.refuse(missing, "no value; leave out cases whose class is not known")
        classes = np.array(list(self.values.values()), dtype=np.int64)
        return torch.from_numpy(classes[column.codes(list(self.values), missing)])


@dataclass(frozen=True)
class Table:
    """The meaning of each column, the same at every hospital.

    ``target`` is `Classes`, or a `Number` to predict. ``patient`` names a column that identifies patients: all rows of
    a patient are in the same part of a split. Other columns are ignored.
    """

    features: Sequence[Number | Category]
    target: Classes | Number
    patient: str | None = None

    def __post_init__(self) -> None:
        names = self._names()
        if not self.features or len(set(names)) < len(names):
            raise ConfigError(f"Table: give one or more features, and each column once; got {', '.join(names)}")
        if isinstance(self.target, Number) and (self.target.indicator or self.target.impute is not None):
            raise ConfigError(f"Table: the target {self.target.name!r} cannot be imputed; leave such cases out")

    @property
    def n_features(self) -> int:
        """Length of an input."""
        return sum(feature.n_features for feature in self.features)

    @property
    def n_outputs(self) -> int:
        """Length of an output: one logit per class, or 1 for a `Number`."""
        return self.target.n_classes if isinstance(self.target, Classes) else 1

    def read(self, file: Path | str, written: Format | Mapping[str, Any] | None = None) -> Cases:
        """Read the cases of one hospital: inputs float32[n_features], targets int64 (float32 for a `Number`).

        Raises:
            DataError: a cell does not fit; the text names file, line and column of the first one, never its content.
        """
        columns = [*self.features, self.target]
        numbers = [column.name for column in columns if column.is_number]
        table = read_csv(Path(file), self._names(), numbers=numbers, written=written)
        encoded = {feature.name: feature.encode(table.columns[feature.name]) for feature in self.features}
        inputs = np.column_stack([values for values, _ in encoded.values()]).astype(np.float32)
        if isinstance(self.target, Classes):
            targets = self.target.targets(table.columns[self.target.name])
        else:
            targets = torch.from_numpy(self.target.encode(table.columns[self.target.name])[0][:, 0].astype(np.float32))
        return Cases(
            torch.from_numpy(inputs),
            targets,
            patients=None if self.patient is None else patients_of(table.columns[self.patient]),
            missing={name: missing for name, (_, missing) in encoded.items()},
        )

    def _names(self) -> list[str]:
        patient = [] if self.patient is None else [self.patient]
        return [*(feature.name for feature in self.features), self.target.name, *patient]


def patients_of(column: Column) -> list[str]:
    """Return the patient of each case.

    Raises:
        DataError: a cell is empty; such cases would otherwise count as one patient.
    """
    column.refuse(column.is_missing(), "no patient; without one a case may be in training and test data")
    return list(column.cells)


def _refuse_values(whose: str, values: Sequence[str | float]) -> None:
    if not values:
        raise ConfigError(f"{whose}: states no values; list all that the column has at any hospital")
    if len(set(values)) < len(values) or len({isinstance(value, str) for value in values}) > 1:
        raise ConfigError(f"{whose}: give each value once, all of them text or all numbers")
