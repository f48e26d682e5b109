"""``fednats demo`` and ``fednats verify``: run a whole federation on this machine, and check a run."""

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fednats.errors import ConfigError
from fednats.services.daemon.lifecycle import configure_logging

if TYPE_CHECKING:
    from fednats.testbed.federation import FederationSettings

commands = typer.Typer()

Output = Annotated[Path, typer.Option(help="folder for everything the run leaves; must not hold a run yet")]
Wan = Annotated[
    str | None, typer.Option(metavar="KEY=NUMBER,...", help='every leaf link is like this: "delay_ms=150,mbit=20"')
]
Slow = Annotated[
    list[str] | None, typer.Option(metavar="SITE=FACTORx", help="a site's training takes so many times as long")
]


class CipherName(StrEnum):
    """How deltas are encrypted."""

    BFV = "bfv"
    NONE = "none"


class Mode(StrEnum):
    """When a version is made: without waiting, or once all sites have reported."""

    ASYNC = "async"
    SYNC = "sync"


@commands.command()
def demo(
    task: Annotated[str, typer.Option(help="ct-nodule, breast-cancer or heart")] = "ct-nodule",
    sites: Annotated[int | None, typer.Option(help="number of hospitals  [default: 5; heart: its 4]")] = None,
    regions: Annotated[int, typer.Option(min=1, help="number of regions, each with its own nats-server")] = 2,
    seed: Annotated[int, typer.Option(help="seed of data, training and rounding")] = 7,
    cipher: Annotated[
        CipherName, typer.Option(help="homomorphic encryption, or none (trusted networks)")
    ] = CipherName.BFV,
    mode: Annotated[Mode, typer.Option(help="async: nobody waits; sync: every version waits for all")] = Mode.ASYNC,
    output: Output = Path("output"),
    data: Annotated[Path | None, typer.Option(help="folder or file with the task's real data")] = None,
    dp: Annotated[bool, typer.Option("--dp", help="differential privacy of each record; docs/privacy.md")] = False,  # noqa: FBT002
    wan: Wan = None,
    slow: Slow = None,
) -> None:
    """Run a demo federation on this machine: real processes, a real bus, encrypted deltas."""
    from fednats.testbed.federation import demo_federation  # noqa: PLC0415 - torch is not for the daemons' start

    federation = demo_federation(
        task,
        n_sites=sites,
        n_regions=regions,
        seed=seed,
        cipher=cipher.value,
        synchronous=mode is Mode.SYNC,
        data=None if data is None else data.resolve(),
        dp=dp,
    )
    run_here(federation, output, wan, slow)


@commands.command()
def verify(directory: Annotated[Path, typer.Argument(metavar="DIR", help="output folder of a run")]) -> None:
    """Replay the journals of a run and check that every accepted update is in exactly one applied sum.

    Exits with code 1 if not. See docs/reliability.md.
    """
    from fednats.verify import joined as ledger  # noqa: PLC0415
    from fednats.verify import table as ledger_table  # noqa: PLC0415

    found = asyncio.run(ledger.settled(directory.resolve()))
    Console().print(ledger_table.table(found))
    for text in (*found.runs, *found.notes, *found.findings, found.line):
        typer.echo(text)
    raise typer.Exit(1 if found.findings else 0)


def run_here(federation: "FederationSettings", output: Path, wan: str | None, slow: list[str] | None) -> None:
    """Run ``federation`` on this machine to its end, and print the results."""
    from fednats.testbed.launch import run_federation  # noqa: PLC0415
    from fednats.testbed.summary import comparison, spent  # noqa: PLC0415
    from fednats.testbed.wan import parse_wan  # noqa: PLC0415

    if wan is not None:
        federation = federation.with_wan(parse_wan(wan))
    federation = federation.with_slow(dict(map(_slow, slow or ())))
    configure_logging("warning")
    summary = asyncio.run(run_federation(federation, output.resolve()))
    Console().print(comparison(summary))
    if (table := spent(summary)) is not None:
        Console().print(table)
    typer.echo(f"{output}/report.html, {output}/summary.json and {output}/model.safetensors are written.")


def _slow(text: str) -> tuple[str, float]:
    site, _, factor = text.rpartition("=")
    try:
        return site, float(factor.removesuffix("x"))
    except ValueError:
        raise ConfigError(f"--slow {text}: give SITE=FACTOR, such as a=10x") from None
