"""``fednats bench``: measurements on this machine."""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import typer

from fednats.cli.rows import print_rows
from fednats.services.daemon.lifecycle import configure_logging

commands = typer.Typer()
bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
commands.add_typer(bench, name="bench")

AsJson = Annotated[bool, typer.Option("--json", help="print a JSON list of rows")]


@bench.command()
def crypto(as_json: AsJson = False) -> None:  # noqa: FBT002
    """Measure time and size of encrypted deltas: 1,000,000 parameters, 5 sites, 8 and 4 bits."""
    from fednats.testbed import bench_crypto  # noqa: PLC0415

    _bench(bench_crypto.run, as_json=as_json)


@bench.command()
def loop(as_json: AsJson = False) -> None:  # noqa: FBT002
    """Measure how late each daemon's event loop runs while five hospitals train and encrypt."""
    from fednats.testbed import bench_loop  # noqa: PLC0415

    _bench(bench_loop.run, as_json=as_json)


@bench.command()
def wan(as_json: AsJson = False) -> None:  # noqa: FBT002
    """Measure the time to a target AUC, in synchronous and asynchronous training.

    Three scenarios: good links, bad links, and bad links with one slow hospital.
    """
    from fednats.testbed import bench_wan  # noqa: PLC0415

    _bench(bench_wan.run, as_json=as_json)


def _bench(measure: Callable[[], Sequence[Mapping[str, object]]], *, as_json: bool) -> None:
    configure_logging("warning")
    print_rows(measure(), as_json=as_json)
