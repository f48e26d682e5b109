"""Reads a hospital's CSV file as columns of text, whatever program wrote it.

Properties that the file shows are detected: the delimiter from the names in the header, UTF-8, UTF-16 and UTF-32 from
the byte order mark. Others are stated in a `Format`, or the file is refused. Errors name file, line and column, never a
cell: a cell is part of a record.
"""

import codecs
import csv
import io
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

from fednats.config import Settings, parse
from fednats.data.column import Column
from fednats.data.decimals import decimal_sign
from fednats.errors import ConfigError, DataError

DELIMITERS = (",", ";", "\t", "|")
_MARKS = (
    (codecs.BOM_UTF8, "utf-8", "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32", "utf-32"),  # before UTF-16, whose mark is the beginning of this one
    (codecs.BOM_UTF32_BE, "utf-32", "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16", "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16", "utf-16"),
)
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")
_LOOKED_AT = 20
"""Rows from which a delimiter is detected."""
_ENCODINGS = "cp1252 (Windows, Western Europe), utf-16, gb18030 (Chinese: GBK), shift_jis, cp1251"


class Format(Settings):
    """How one hospital writes its CSV files; it does not change the meaning of a table."""

    delimiter: Annotated[str, Field(min_length=1, max_length=1)] | None = Field(
        None, description="between cells; None: the one of , ; tab | that makes the expected columns"
    )
    decimal: Literal[".", ","] | None = Field(None, description="None: the sign that the numbers show")
    thousands: Literal[".", ",", " ", "'"] | None = Field(None, description="None: numbers have no such sign")
    encoding: str | None = Field(None, description="None: UTF-8, or what the byte order mark says")
    columns: tuple[str, ...] | None = Field(None, description="names in the file's order, if it has no header")
    missing: tuple[str, ...] = Field((), description="what else stands for a missing value here, such as -99")


@dataclass(frozen=True)
class CsvFile:
    """The requested columns by name; cells are stripped text."""

    file: Path
    columns: Mapping[str, Column]


def format_of(stated: Format | Mapping[str, Any] | None) -> Format:
    """Return the format that a task's option states, such as ``{"decimal": ","}``.

    Raises:
        ConfigError: an unknown key or a wrong value; the text names it.
    """
    return stated if isinstance(stated, Format) else parse(stated or {}, Format, source="format of the CSV file")


def read_csv(
    file: Path,
    required: Sequence[str],
    optional: Sequence[str] = (),
    *,
    numbers: Sequence[str] = (),
    written: Format | Mapping[str, Any] | None = None,
) -> CsvFile:
    """Read the columns ``required``, and those of ``optional`` that exist; others are ignored.

    Columns are found by name, in any order. Rows without any value, which spreadsheets leave at the end, are skipped.
    ``numbers`` names the columns of numbers, which show the file's decimal sign.

    Raises:
        ConfigError: no file is given.
        DataError: the file does not fit; the text names line and column, and the remedy.
    """
    form = format_of(written)
    text, first_line = _text(file, form), 1
    if text[:4].lower() == "sep=" and text[5:6] in "\r\n":  # Excel states the delimiter this way
        form = form.model_copy(update={"delimiter": form.delimiter or text[4]})
        text, first_line = text[5:].removeprefix("\r").removeprefix("\n"), 2
    delimiter = form.delimiter or _delimiter(file, text, required, form)
    rows = _rows(file, text, delimiter, first_line)
    if form.columns is None:
        _, header = next(rows, (0, []))
        names = [unicodedata.normalize("NFC", name.strip()) for name in header]
    else:
        names = list(form.columns)
    places = _places(file, names, required, optional, headless=form.columns is not None)
    lines, cells = _cells(file, rows, names, places, headless=form.columns is not None)
    series = {name: pd.Series(column, index=lines, dtype="str") for name, column in cells.items()}
    with_numbers = {name: series[name] for name in numbers if name in series}
    sign = form.decimal or decimal_sign(file, with_numbers, form.thousands, delimiter)
    return CsvFile(
        file,
        {name: Column(file, name, column, sign, form.thousands, form.missing) for name, column in series.items()},
    )


def first_rows(file: Path, written: Format) -> tuple[str, list[str]]:
    """Return the delimiter and the header of a file whose columns are not described yet.

    Raises:
        DataError: not exactly one delimiter, or not the stated one, splits the first lines into rows of equal length.
    """
    text = _text(file, written)
    if text[:4].lower() == "sep=" and text[5:6] in "\r\n":
        raise DataError(f"{file}: its first line states the delimiter for Excel; remove that line")
    fitting = {}
    for delimiter in [written.delimiter] if written.delimiter else DELIMITERS:
        try:
            rows = [row for _, row in islice(_rows(file, text, delimiter, 1), _LOOKED_AT)]
        except DataError:  # the quotes do not fit this delimiter
            continue
        if len(rows[0]) > 1 and len({len(row) for row in rows}) == 1:
            fitting[delimiter] = [name.strip() for name in rows[0]]
    if len(fitting) != 1:
        found = f"{len(fitting)} delimiters make" if fitting else "no delimiter makes"
        raise DataError(f"{file}: {found} columns of its first lines; state the delimiter")
    return next(iter(fitting.items()))


# --- bytes to text ---------------------------------------------------------------------------------------------------


def _text(file: Path, form: Format) -> str:
    if file == Path():
        raise ConfigError("no CSV file is given; set the option of the task that names it")
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{file}: no such file (looked in {Path.cwd()})") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from error
    if data.startswith(_WORKBOOKS):
        raise DataError(f"{file}: an Excel workbook or an archive; save the sheet as CSV")
    try:
        text = data.decode(_codec(file, data, form.encoding))
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        said = f"encoding {form.encoding} is not what it is written in" if form.encoding else "not UTF-8"
        raise DataError(f"{file}, line {line}: {said}; state the right encoding, such as {_ENCODINGS}") from None
    except LookupError:
        raise DataError(f"{file}: there is no encoding {form.encoding!r}; state one such as {_ENCODINGS}") from None
    if "\0" in text:
        raise DataError(f"{file}: holds zero bytes, as UTF-16 does; state encoding: utf-16-le or utf-16-be")
    if not text.strip():
        raise DataError(f"{file}: is empty")
    return unicodedata.normalize("NFC", text.removeprefix("\ufeff"))


def _codec(file: Path, data: bytes, stated: str | None) -> str:
    marked = next(((name, codec) for mark, name, codec in _MARKS if data.startswith(mark)), None)
    known = "utf-8" if stated is None else codecs.lookup(stated).name
    if marked is None:
        return known
    name, codec = marked
    if stated is not None and not known.startswith(name):
        raise DataError(f"{file}: begins with the mark of {name}, but encoding {stated} is stated; leave it out")
    return codec


# --- text to rows ----------------------------------------------------------------------------------------------------


def _delimiter(file: Path, text: str, required: Sequence[str], form: Format) -> str:
    """Return the delimiter that makes most required columns; with stated columns, the only one that makes as many."""
    first = {delimiter: _first_row(text, delimiter) for delimiter in DELIMITERS}
    if form.columns is not None:
        fitting = [delimiter for delimiter, row in first.items() if len(row) == len(form.columns)]
        if len(fitting) != 1:
            makes = f"{len(fitting)} delimiters make" if fitting else "no delimiter makes"
            raise DataError(f"{file}: {makes} {len(form.columns)} cells of its first line; state the delimiter")
        return fitting[0]
    return max(DELIMITERS, key=lambda delimiter: len(set(required) & set(first[delimiter])))


def _first_row(text: str, delimiter: str) -> list[str]:
    try:
        filled = (row for row in _reader(text, delimiter) if any(map(str.strip, row)))
        return [cell.strip() for cell in next(filled, [])]
    except csv.Error:  # the quotes do not fit this delimiter
        return []


def _reader(text: str, delimiter: str) -> Any:
    return csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=True)


def _rows(file: Path, text: str, delimiter: str, first_line: int) -> Iterator[tuple[int, list[str]]]:
    """Yield rows that hold a value, each with its first line; quoted cells may span several lines."""
    reader = _reader(text, delimiter)
    while True:
        line = reader.line_num + first_line
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DataError(f"{file}, line {line}: {error}; is a quotation mark missing or one too many?") from None
        if any(cell.strip() for cell in row):
            yield line, row


def _places(
    file: Path, names: Sequence[str], required: Sequence[str], optional: Sequence[str], *, headless: bool
) -> dict[str, int]:
    """Return the position of each column."""
    where = "the stated columns" if headless else "its header"
    if absent := [name for name in required if name not in names]:
        hint = ""
        close = {name.casefold(): position for position, name in enumerate(names, start=1)}
        if found := [f"{name}: column {close[name.casefold()]}" for name in absent if name.casefold() in close]:
            hint = f"; upper and lower case differ ({', '.join(found)})"
        elif not headless and len(absent) == len(required):
            hint = "; does the first line name the columns? If not, state columns, their names in the file's order"
        if not all(map(str.isascii, names)):
            hint += "; is the encoding right?"
        raise DataError(f"{file}: no column {', '.join(absent)} in {where}{hint}")
    wanted = [*required, *(name for name in optional if name in names)]
    if double := [name for name in wanted if names.count(name) > 1]:
        raise DataError(f"{file}: {where} has the column {', '.join(double)} more than once; which one is meant?")
    return {name: names.index(name) for name in wanted}


def _cells(
    file: Path,
    rows: Iterator[tuple[int, list[str]]],
    names: Sequence[str],
    places: Mapping[str, int],
    *,
    headless: bool,
) -> tuple[list[int], dict[str, list[str]]]:
    lines: list[int] = []
    cells: dict[str, list[str]] = {name: [] for name in places}
    for line, row in rows:
        if len(row) != len(names):
            expected = "columns stated" if headless else "in the header"
            raise DataError(
                f"{file}, line {line}: {len(row)} cells, {len(names)} {expected};"
                " is it cut off, or a delimiter within a cell that is not quoted?"
            )
        if headless and not lines and [cell.strip() for cell in row] == list(names):
            raise DataError(f"{file}, line {line}: it is a header; leave the stated columns out")
        lines.append(line)
        for name, place in places.items():
            cells[name].append(row[place].strip())
    if not lines:
        raise DataError(f"{file}: holds no rows" + ("" if headless else " below its header"))
    return lines, cells
