"""The command line: ``fednats --help``. A file for each group of commands."""

import typer

from fednats import __version__
from fednats.cli import audit, bench, daemons, federation, link, provision, task
from fednats.cli.errors import report

app = typer.Typer(
    help="Train one model over many hospitals while every record stays where it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for group in (federation, task, daemons, provision, link, bench, audit):
    app.add_typer(group.commands)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command line; an error is one line, not a traceback."""
    try:
        app()
    except Exception as error:  # noqa: BLE001 - nobody who runs a command is to read a traceback
        raise SystemExit(report(error)) from None
