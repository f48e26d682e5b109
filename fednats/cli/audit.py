"""``fednats audit``: check and read a hospital's record of what left it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fednats.errors import ConfigError

if TYPE_CHECKING:
    from fednats.ledger.audit import Audit

commands = typer.Typer()
audit = typer.Typer(help="What left a hospital: check its ledger, and read it.", no_args_is_help=True)
commands.add_typer(audit, name="audit")

LedgerFile = Annotated[Path, typer.Argument(metavar="LEDGER", help="such as state/egress-ledger.jsonl")]
SignersFiles = Annotated[
    list[Path] | None,
    typer.Option("--signers", help="the run's signers.toml; again for those of earlier epochs, if keys were changed"),
]


@audit.command("verify")
def audit_verify(
    ledger: LedgerFile,
    signers: SignersFiles = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(metavar="LEDGER", help="ledger of the region (or the coordinator) that accepted what left"),
    ] = None,
) -> None:
    """Check that a ledger is whole and who signed it.

    If it is not, says where and exits with code 1. See docs/audit.md.
    """
    found = _audit(ledger, signers, against)
    for text in (*found.notes, *found.gaps, *found.findings, found.line):
        typer.echo(text)
    raise typer.Exit(1 if found.findings or found.gaps else 0)


@audit.command("show")
def audit_show(
    ledger: LedgerFile,
    html: Annotated[Path | None, typer.Option(help="write a page for a browser instead")] = None,
    signers: SignersFiles = None,
) -> None:
    """Print a ledger, or write it as an HTML page: totals by kind and day, epsilon over time, all records."""
    from fednats.ledger import page as ledger_page  # noqa: PLC0415

    found = _audit(ledger, signers)
    if html is None:
        Console().print(ledger_page.table(found))
    else:
        try:
            html.write_text(ledger_page.page(found), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{html}: cannot be written ({error.strerror}); give another --html") from error
        typer.echo(f"{html} is written.")
    for text in (*found.gaps, *found.findings, found.line):
        typer.echo(text)


def _audit(ledger: Path, signers: list[Path] | None, against: list[Path] | None = None) -> "Audit":
    from fednats.crypto.signers import read_roster  # noqa: PLC0415
    from fednats.ledger.audit import audit as read_and_verify  # noqa: PLC0415

    return read_and_verify(ledger, [read_roster(file) for file in signers or ()], against or ())
