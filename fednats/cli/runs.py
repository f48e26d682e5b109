"""``fednats run``: run a federation file on this machine, or manage the runs of a deployed federation."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from fednats.cli.arguments import FederationFile
from fednats.cli.daemons import ConfigFile
from fednats.cli.federation import Output, Slow, Wan, run_here
from fednats.config import CoordinatorSettings, Extension, RunSettings, load
from fednats.services.daemon.lifecycle import configure_logging

if TYPE_CHECKING:
    from fednats.messages import RunRow
    from fednats.services.coordinator.run_orders import Orders

HERE = "here"


class _FileOrCommand(TyperGroup):
    """Accepts a file in place of a command: ``run FEDERATION.toml`` means ``run here FEDERATION.toml``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and "--help" not in args[:1]:
            args = [HERE, *args]
        return super().parse_args(ctx, args)


commands = typer.Typer()
run = typer.Typer(
    cls=_FileOrCommand,
    no_args_is_help=True,
    help="Run a federation on this machine (run FEDERATION.toml), or start, extend and list the runs of one whose"
    " daemons stand; docs/runs.md.",
)
commands.add_typer(run, name="run")


@run.command(HERE)
def here(federation: FederationFile, output: Output = Path("output"), wan: Wan = None, slow: Slow = None) -> None:
    """Run your federation on this machine, as processes. The word `here` may be left out.

    See docs/federation-file.md.
    """
    from fednats.testbed.federation import load_federation  # noqa: PLC0415 - torch is not for the daemons' start

    run_here(load_federation(federation), output, wan, slow)


@run.command()
def start(
    settings: Annotated[
        Path, typer.Argument(metavar="RUN.toml", help="name, seed, training, stop, initial_model, ...")
    ],
    config: ConfigFile,
) -> None:
    """Start another run with the daemons that are running. --config is the coordinator's settings file."""
    wanted = load(settings, RunSettings, environment={})
    row = _order(config, lambda orders: orders.start(wanted))
    typer.echo(f"run {row.name} is open, its first version is {row.first_version}")


@run.command()
def extend(
    config: ConfigFile,
    versions: Annotated[int, typer.Option(min=1, help="versions that the run may have beyond those it has")],
    wall_s: Annotated[
        float | None, typer.Option(help="longest time from now on  [default: max_wall_s of the run, if it has one]")
    ] = None,
    target: Annotated[float | None, typer.Option(help="another target  [default: the run's]")] = None,
) -> None:
    """Continue the newest run, which must be closed, from where it ended."""
    extension = Extension(versions=versions, wall_s=wall_s, target=target)
    row = _order(config, lambda orders: orders.extend(extension))
    typer.echo(f"run {row.name} is open again, and has up to {versions} more versions")


@run.command("list")
def list_runs(config: ConfigFile) -> None:
    """Print all runs of the federation: state, versions, best version, target, times."""
    rows = _order(config, lambda orders: orders.list())
    table = Table("run", "state", "versions", "best", "target reached", "opened (UTC)", "closed (UTC)", "why")
    for row in rows:
        best = "" if row.best is None else f"version {row.best}: {row.metric} {row.value:.4g}"
        reached = "" if row.reached_target_at is None else f"version {row.reached_target_at}"
        versions = f"{row.first_version} to {row.last_version}"
        table.add_row(row.name, row.state, versions, best, reached, row.opened[:19], row.closed[:19], row.reason)
    Console().print(table)


def _order(config: Path, give: "Callable[[Orders], Awaitable[Any]]") -> Any:
    from fednats.services.coordinator.run_orders import giving_orders  # noqa: PLC0415

    settings = load(config, CoordinatorSettings)

    async def ordering() -> "RunRow | tuple[RunRow, ...]":
        async with giving_orders(settings) as orders:
            answer: RunRow | tuple[RunRow, ...] = await give(orders)
            return answer

    configure_logging("warning")
    return asyncio.run(ordering())
