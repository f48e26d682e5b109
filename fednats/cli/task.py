"""``fednats task``: write a new task, and print the hash that identifies a task in a policy."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

commands = typer.Typer()
task = typer.Typer(help="Write a task of your own, or print a task's hash.", no_args_is_help=True)
commands.add_typer(task, name="task")


class DataSource(StrEnum):
    """The form of a hospital's data."""

    CSV = "csv"
    IMAGES = "images"
    DICOM = "dicom"


@task.command("new")
def task_new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="of the task, such as ward_7: it makes ward_7.py")],
    source: Annotated[DataSource, typer.Option("--from", help="what your data is")],
    data: Annotated[
        Path | None, typer.Option(metavar="FILE", help="a CSV with a header: its columns become the task's schema")
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="the column to predict  [default: the last]")
    ] = None,
    delimiter: Annotated[str | None, typer.Option(help="of the CSV, if it is not found out")] = None,
    encoding: Annotated[str | None, typer.Option(help="of the CSV, if it is not UTF-8")] = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for the files")] = Path(),
) -> None:
    """Write a task, and a federation file to try it with. Overwrites nothing and shows no value of the data."""
    from fednats.templates.new_task import new_task  # noqa: PLC0415 - torch

    stated = {"delimiter": delimiter, "encoding": encoding}
    written = {key: value for key, value in stated.items() if value is not None}
    made = new_task(name, source.value, out, data=data, label=label, written=written)
    for file in made.files:
        typer.echo(file)
    if made.to_fill:
        typer.echo(
            f"fill in, in {made.files[0]}: the values of {', '.join(made.to_fill)}; mean and scale of each Number"
        )
    typer.echo(f"set, in {made.files[1]}: where the data of each hospital is; then: fednats run {made.files[1]}")


@task.command("hash")
def task_hash(
    path: Annotated[
        str,
        typer.Argument(metavar="PATH", help="a Python file, a folder with an __init__.py, a wheel, or a shipped task"),
    ],
) -> None:
    """Print the SHA-256 of a task's code, for task_sha256 in policy.toml.

    docs/tasks.md says what is hashed.
    """
    from fednats.learning.code_files import read_code  # noqa: PLC0415 - as above
    from fednats.learning.task_code import code_path  # noqa: PLC0415

    typer.echo(f"{read_code(code_path(path)).sha256}  {path}")
