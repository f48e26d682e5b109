"""One column of a CSV file: text cells with their lines, read as numbers or codes."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fednats.errors import DataError

MISSING = ("", "?", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null")
"""Cells that mean a missing value in every file, unless a column has one of them as a code."""
_SPACES = "[ \u00a0\u202f]"

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Column:
    """Text cells [n], indexed by their line in the file."""

    file: Path
    name: str
    cells: "pd.Series[str]"
    decimal: str
    thousands: str | None
    missing: tuple[str, ...]

    def is_missing(self, codes: Collection[str] = ()) -> Mask:
        """Mark the cells without a value, bool[n]; a cell with one of ``codes`` always has a value."""
        markers = set(MISSING).union(self.missing).difference(codes)
        return self.cells.isin(markers).to_numpy(dtype=bool, copy=True)

    def numbers(self, missing: Mask) -> NDArray[np.float64]:
        """Read the cells as numbers float64[n], NaN where ``missing``.

        Raises:
            DataError: a cell is not a finite number; the text names its line.
        """
        d = re.escape(self.decimal)
        text = self.cells.mask(pd.Series(missing, self.cells.index), "0")
        if self.thousands is not None:
            t = _SPACES if self.thousands == " " else re.escape(self.thousands)
            grouped = text.str.fullmatch(rf"[+-]?\d{{1,3}}(?:{t}\d{{3}})+(?:{d}\d*)?").astype(bool)
            text = text.mask(grouped, text.str.replace(t, "", regex=True))
        plain = text.str.fullmatch(rf"[+-]?(?:\d+(?:{d}\d*)?|{d}\d+)(?:[eE][+-]?\d+)?")
        self.refuse(~plain.to_numpy(dtype=bool), f"no finite number{self._hint(text[~plain.astype(bool)])}")
        values = text.str.replace(self.decimal, ".", regex=False).to_numpy(dtype=np.float64)
        self.refuse(~np.isfinite(values), "too large a number")
        values[missing] = np.nan
        return values

    def whole_numbers(self) -> list[int | None]:
        """Read the cells as whole numbers, None for a missing one; raises DataError."""
        missing = self.is_missing()
        values = self.numbers(missing)
        self.refuse(~missing & (values != np.round(values)), "no whole number")
        return [None if gone else int(value) for value, gone in zip(values, missing, strict=True)]

    def codes(self, values: Sequence[str | float], missing: Mask) -> NDArray[np.int64]:
        """Return the position of each cell among ``values``, int64[n]; -1 where ``missing``.

        Numbers are compared as numbers: 1, 1.0 and 01 are one code.

        Raises:
            DataError: a cell is none of ``values``; the text names its line.
        """
        own: Sequence[float] | Sequence[str]
        if all(isinstance(value, int | float) for value in values):
            own = list(self.numbers(missing))
        else:
            own = list(self.cells)
        places = {value: position for position, value in enumerate(values)}
        found = np.array([places.get(value, -1) for value in own], dtype=np.int64)
        found[missing] = -1
        stated = ", ".join(map(str, values))
        self.refuse((found < 0) & ~missing, f"none of the values that the task states ({stated}){self._garbled()}")
        return found

    def refuse(self, wrong: Mask, what: str) -> None:
        """Raise DataError if any cell is ``wrong``, bool[n]; the text names the first line and the number of others."""
        if not wrong.any():
            return
        more = int(wrong.sum()) - 1
        others = f" (and in {more} more line{'s' * (more > 1)})" if more else ""
        raise DataError(
            f"{self.file}, line {self.cells.index[int(wrong.argmax())]}, column {self.name}: {what}{others}"
        )

    def _hint(self, wrong: "pd.Series[str]") -> str:
        if wrong.empty:
            return ""
        cell = str(wrong.iloc[0])
        other = "," if self.decimal == "." else "."
        if re.fullmatch(rf"[+-]?\d{{1,3}}(?:(?:{re.escape(other)}|'|{_SPACES})\d{{3}})+(?:\D\d*)?", cell):
            return f"; a thousands sign? State thousands; the decimal sign here is {self.decimal}"
        if re.fullmatch(rf"[+-]?\d+{re.escape(other)}\d+", cell):
            return f"; the decimal sign of this file is {self.decimal}"
        if cell[0] in "<>":
            return "; a limit of detection? Put a number, or a missing value, in its place"
        return "; state what else stands for a missing value, if that is what it is"

    def _garbled(self) -> str:
        return "" if all(cell.isascii() for cell in self.cells) else "; is the encoding right?"
