"""The command line, ``fednats --help``, with a file for each group of commands."""

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


def _print_version(asked: bool) -> None:  # noqa: FBT001 - typer passes it by position
    if asked:
        typer.echo(f"fednats {__version__}")
        raise typer.Exit


@app.callback()
def fednats(
    _version: Annotated[  # noqa: FBT002 - an option of the command line
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train one model across hospitals; no patient record leaves a hospital."""


def main() -> None:
    """Run the command line; an error is one line, not a traceback."""
    try:
        app()
    except Exception as error:  # noqa: BLE001 - a user of the command line gets no traceback
        raise SystemExit(report(error)) from None
