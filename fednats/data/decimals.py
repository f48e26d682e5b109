"""Detects a file's decimal sign: ``1,5`` and ``1.234,5`` show a comma, ``1.5`` a point, ``1,234`` could be either."""

import re
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from fednats.errors import DataError

SIGNS = {".": ",", ",": "."}
"""Each sign, and its alternative."""
AMBIGUOUS = r"[+-]?[1-9]\d{0,2}[.,]\d{3}"


def decimal_sign(file: Path, columns: Mapping[str, "pd.Series[str]"], thousands: str | None, delimiter: str) -> str:
    """Return ``.`` or ``,`` from the text cells of number columns; ``thousands`` is the stated thousands sign.

    Raises:
        DataError: the cells show both signs, or are ambiguous.
    """
    if thousands in SIGNS:
        return SIGNS[thousands]
    if thousands is not None:
        columns = {name: cells.str.replace(r"[\s']", "", regex=True) for name, cells in columns.items()}
    shown = {sign: _first(columns, _pattern(sign)) for sign in SIGNS}
    if (point := shown["."]) is not None and (comma := shown[","]) is not None:
        raise DataError(
            f"{file}: a decimal point in {point}, a decimal comma in {comma}; use one of them in the whole file"
        )
    for sign, place in shown.items():
        if place is not None:
            return sign
    if delimiter != "," and (either := _first(columns, AMBIGUOUS)) is not None:
        raise DataError(
            f"{file}, {either}: the sign before three digits may be a decimal or a thousands sign; state decimal"
        )
    return "."


def _pattern(sign: str) -> str:
    """Return a pattern of numbers in which ``sign`` can only be the decimal sign."""
    d, t = re.escape(sign), re.escape(SIGNS[sign])
    grouped = rf"[+-]?\d{{1,3}}(?:(?:{t}\d{{3}}){{2,}}|(?:{t}\d{{3}})+{d}\d*)"
    return rf"(?!{AMBIGUOUS}$)(?:{grouped}|[+-]?(?:\d+{d}\d*|{d}\d+)(?:[eE][+-]?\d+)?)"


def _first(columns: Mapping[str, "pd.Series[str]"], pattern: str) -> str | None:
    for name, cells in columns.items():
        fits = cells.str.fullmatch(pattern)
        if fits.any():
            return f"line {fits.idxmax()}, column {name}"
    return None
