"""Guesses a first schema for an undescribed CSV file: names from its header, kinds from its cells.

The result contains no cell, because a task's file goes to every hospital.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fednats.data.column import Column
from fednats.data.csv_file import Format, first_rows, format_of, read_csv
from fednats.errors import ConfigError, DataError

MOST_VALUES = 20
"""Largest number of different texts in a category column."""
FEW_NUMBERS = 5
"""Largest number of different whole numbers that may be codes."""
_NUMBER = r"[+-]?(\d[\d.,' ]*|[.,]\d+)([eE][+-]?\d+)?"
_PATIENT = re.compile(r"(^|[^a-z])(patient|pat|pid|mrn)([^a-z]|$)|patient_?id", re.IGNORECASE)

Kind = Literal["number", "category", "text", "empty"]


@dataclass(frozen=True)
class Guessed:
    """A guess about one column."""

    name: str
    kind: Kind
    n_different: int
    """Number of different values, missing ones not counted."""
    missing: bool
    """Whether values are missing."""
    codes: bool = False
    """Whether its numbers may be codes: a few whole numbers."""
    counter: bool = False
    """Whether each row has a different whole number, so that it may number the rows."""

    @property
    def patient(self) -> bool:
        """Whether its name suggests that it identifies patients."""
        return _PATIENT.search(self.name) is not None


def guess_columns(file: Path, written: Format | Mapping[str, Any] | None = None) -> list[Guessed]:
    """Guess the kind of each column of a file with a header.

    Raises:
        DataError: it has no header, repeats a name, or cannot be read; as `read_csv`.
    """
    form = format_of(written)
    delimiter, header = first_rows(file, form)
    if form.columns is not None or any(re.fullmatch(_NUMBER, name) for name in header):
        raise DataError(f"{file}: its first line does not name the columns; put one with their names before it")
    names = [name for name in header if name]
    if len(set(names)) < len(names):
        raise DataError(f"{file}: its header has a name more than once; rename one of the two")
    read = read_csv(file, names, written=form.model_copy(update={"delimiter": delimiter}))
    return [_guess(read.columns[name]) for name in names]


def _guess(column: Column) -> Guessed:
    missing = column.is_missing()
    cells = column.cells[~missing]
    n_different = cells.nunique()
    if not n_different:
        return Guessed(column.name, "empty", 0, missing=True)
    is_number = bool(cells.str.fullmatch(_NUMBER).all())
    kind: Kind = "number" if is_number else "category" if n_different <= MOST_VALUES else "text"
    whole = is_number and bool(cells.str.fullmatch(r"\d+").all())
    return Guessed(
        column.name,
        kind,
        n_different,
        bool(missing.any()),
        codes=whole and n_different <= FEW_NUMBERS,
        counter=whole and n_different == len(column.cells) > FEW_NUMBERS,
    )


def target_of(columns: Sequence[Guessed], label: str | None, file: Path) -> Guessed:
    """Return the column named ``label``, or the last one without a label; raises ConfigError if there is none."""
    found = [column for column in columns if label in (None, column.name)]
    if not found:
        raise ConfigError(f"--label {label}: {file} has no such column; it has {', '.join(c.name for c in columns)}")
    return found[-1]
