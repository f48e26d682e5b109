"""``labels.csv`` in a folder of images: one line per case, with file, label and optionally patient.

::

    file,label,patient
    2024/0001.png,benign,p1
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fednats.data.column import Column
from fednats.data.csv_file import Format, read_csv
from fednats.data.table import Classes, patients_of
from fednats.errors import ConfigError, DataError

INDEX = "labels.csv"
PATIENT = "patient"


@dataclass(frozen=True)
class Index:
    """The cases of a folder, in the order of its ``labels.csv``."""

    files: Sequence[Path]
    targets: Tensor
    """int64[n]."""
    patients: Sequence[str] | None
    lines: Sequence[str]
    """Where each case is named, for errors: ``labels.csv, line 3``."""
    columns: Mapping[str, Column]
    """All requested columns that exist."""

    def whole_numbers(self, name: str) -> list[int | None]:
        """Read an optional column, with None for empty cells or if the column is absent; raises DataError."""
        column = self.columns.get(name)
        return [None] * len(self.files) if column is None else column.whole_numbers()


def read_index(
    folder: Path,
    label: Classes,
    *,
    required: Sequence[str] = (),
    whole_numbers: Sequence[str] = (),
    written: Format | Mapping[str, Any] | None = None,
) -> Index:
    """Read ``labels.csv``: the columns ``file``, the label's and ``required``; other columns may be absent.

    Raises:
        ConfigError: no folder is given.
        DataError: a cell does not fit, or a file does not exist; the text names the line.
    """
    if folder == Path():
        raise ConfigError("no folder is given; set the option of the task that names it")
    table = folder / INDEX
    read = read_csv(
        table,
        ["file", label.name, *required],
        [PATIENT, *whole_numbers],
        numbers=[label.name] * label.is_number + list(whole_numbers),
        written=written,
    )
    names = read.columns["file"]
    names.refuse(names.is_missing(), "no file")
    lines = [f"{table}, line {line}" for line in names.cells.index]
    files = [folder / name for name in names.cells]
    for line, file in zip(lines, files, strict=True):
        if not file.is_file():
            raise DataError(f"{line}: {file}: no such file; names are relative to the folder of {INDEX}")
    return Index(
        files=files,
        targets=label.targets(read.columns[label.name]),
        patients=patients_of(read.columns[PATIENT]) if PATIENT in read.columns else None,
        lines=lines,
        columns=read.columns,
    )
