"""The command line: ``fednats --help``. A file for each group of commands."""

from typing import Annotated

import typer

from fednats import __version__
from fednats.cli import audit, bench, check, daemons, federation, link, provision, runs, task
from fednats.cli.errors import report

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (federation, runs, task, check, daemons, provision, link, bench, audit):
    app.add_typer(group.commands)


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer calls it so
    if asked:
        typer.echo(f"fednats {__version__}")
        raise typer.Exit


@app.callback()
def fednats(
    _version: Annotated[  # noqa: FBT002 - an option of the command line
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train one model over many hospitals while every record stays where it is."""


def main() -> None:
    """Run the command line; an error is one line, not a traceback."""
    try:
        app()
    except Exception as error:  # noqa: BLE001 - nobody who runs a command is to read a traceback
        raise SystemExit(report(error)) from None
