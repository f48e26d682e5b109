"""Writes the first files of a user's own task: the task, and a federation that runs it."""

import inspect
import json
import keyword
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fednats.config import parse
from fednats.data.guess import Guessed, guess_columns, target_of
from fednats.errors import ConfigError
from fednats.templates import csv_task, dicom_task, images_task
from fednats.testbed.federation import FederationSettings

SITES = {"a": "north", "b": "north", "c": "south", "d": "south"}
"""Sites of the federation that is written, and their regions."""
KINDS = {"csv": csv_task, "images": images_task, "dicom": dicom_task}

_FEDERATION = """\
# Try it on this machine: fednats run federation.toml. docs/federation-file.md explains every setting.

name = {name}
task = {task}

[training]                  # at a hospital, between two versions of the model
local_steps = 50            # batches
batch_size = 32
learning_rate = 0.02

[stop]
max_versions = 20
target_metric = "auc"       # chooses the best version

[regions.north]             # at least two hospitals in each
[regions.south]
"""


@dataclass(frozen=True)
class Written:
    """Files that were written, and columns that still need work."""

    files: tuple[Path, ...]
    to_fill: tuple[str, ...]
    """Columns whose values the user must still list."""


def new_task(
    name: str,
    kind: str,
    folder: Path,
    *,
    data: Path | None = None,
    label: str | None = None,
    written: Mapping[str, Any] | None = None,
) -> Written:
    """Write ``NAME.py`` and ``federation.toml`` into ``folder``; existing files are not overwritten.

    With ``data``, a CSV file, the task gets its columns; ``label`` names the column to predict, by default the last.
    ``written`` is that file's format.

    Raises:
        ConfigError: the name does not fit a file, a file exists already or cannot be written, or ``data`` lacks columns
            to learn from or ``label``.
        DataError: ``data`` cannot be read.
    """
    if not name.isascii() or not name.isidentifier() or keyword.iskeyword(name):
        raise ConfigError(f"{name}: give the task a name of letters, digits and _, such as ward_7")
    if kind != "csv" and data is not None:
        raise ConfigError(
            f"--data: only a task --from csv is made from a file; name the folder of {kind} in federation.toml"
        )
    columns = [] if data is None else guess_columns(data, written)
    target = None if data is None else target_of(columns, label, data)
    task, federation = folder / f"{name}.py", folder / "federation.toml"
    text = inspect.getsource(KINDS[kind])
    if target is not None:
        text = re.sub(r"(?<=\n)PATIENTS = Table\(.*?\n\)\n", lambda _: schema(columns, target), text, flags=re.DOTALL)
    content = {task: text, federation: federation_text(name, kind, folder, data, written)}
    for file in content:
        if file.exists():
            raise ConfigError(f"{file}: is there already and is not overwritten; give another name or --out")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, lines in content.items():
            with file.open("x", encoding="utf-8") as opened:
                opened.write(lines)
    except OSError as error:
        raise ConfigError(f"{error.filename}: cannot be written ({error.strerror}); give another --out") from error
    to_fill = [
        column.name for column in columns if column is target or (column.kind == "category" and not column.patient)
    ]
    return Written(tuple(content), tuple(to_fill))


def federation_text(name: str, kind: str, folder: Path, data: Path | None, written: Mapping[str, Any] | None) -> str:
    """Return a federation file for ``NAME.py`` beside it: four hospitals in two regions, the first with ``data``."""
    sites: dict[str, Any] = {}
    for site, region in SITES.items():
        place = (folder / "data" / (f"{site}.csv" if kind == "csv" else site)).absolute()
        options: dict[str, Any] = {"csv" if kind == "csv" else "folder": str(place)}
        if data is not None and site == "a":
            options = {"csv": str(data.absolute()), **({"csv_format": dict(written)} if written else {})}
        sites[site] = {"region": region, "options": options}
    text = _FEDERATION.format(name=json.dumps(name), task=json.dumps(f"{name}.py:MyTask"))
    text += "\n" + tomli_w.dumps({"sites": sites})
    parse(tomllib.loads(text), FederationSettings, source="federation.toml")
    return text


def schema(columns: Sequence[Guessed], target: Guessed) -> str:
    """Return Python code for a table with ``columns``; blanks that only a person can fill in are marked."""
    patient = next((column for column in columns if column.patient and column is not target), None)
    lines = [_feature(column) for column in columns if column not in (target, patient)]
    if not any(line.lstrip().startswith(("Number", "Category")) for line in lines):
        raise ConfigError("the file has no column of numbers or of a few different values to learn from")
    to_list = f"# the class, from 0, of each of its {target.n_different} values; or Number(...), and a loss()"
    who = '    patient="..."' if patient is None else f"    patient={_quoted(patient.name)}"
    return "\n".join(
        [
            "PATIENTS = Table(",
            "    features=(",
            *lines,
            "    ),",
            f"    target=Classes({_quoted(target.name)}, {{}}),  {to_list}",
            f"    {'# ' if patient is None else ''}{who.strip()},  # all rows of a patient are either trained or tested on",
            ")\n",
        ]
    )


def _feature(column: Guessed) -> str:
    name = _quoted(column.name)
    gaps = ", indicator=True" if column.missing else ""
    if column.kind == "empty":
        return f"        # {name}: empty, left out"
    if column.counter:
        return f"        # {name}: another whole number in each row, left out"
    if column.kind == "text" or column.patient:
        return f"        # {name}: text with {column.n_different} different values, left out"
    if column.kind == "category":
        return (
            f"        Category({name}, (){gaps}),  # list its {column.n_different} values, and those of other hospitals"
        )
    codes = f"  # {column.n_different} different numbers: codes? Then Category" if column.codes else ""
    return f"        Number({name}, mean=..., scale=...{gaps}),{codes}"


def _quoted(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)
