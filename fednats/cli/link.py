"""``fednats link``: show and cut links."""

import asyncio
from pathlib import Path
from typing import Annotated

import typer

from fednats.cli.rows import print_rows

commands = typer.Typer()
link = typer.Typer(help="See and cut the links of a federation that runs on this machine.", no_args_is_help=True)
commands.add_typer(link, name="link")

RunsIn = Annotated[Path, typer.Option("--output", help="the --output of a federation that runs now")]
LinkName = Annotated[str, typer.Argument(metavar="NAME", help="a region, a site, or a link as `link show` names it")]


@link.command()
def show(output: RunsIn = Path("output")) -> None:
    """Print each link with its settings, its state, and the bytes that have crossed it."""
    _ask_links(output, "show")


@link.command()
def cut(name: LinkName, output: RunsIn = Path("output")) -> None:
    """Cut a link: every packet on it is lost until `fednats link restore`."""
    _ask_links(output, "cut", name)


@link.command()
def restore(name: LinkName, output: RunsIn = Path("output")) -> None:
    """Restore a link that was cut; connections from before or during the cut are reset."""
    _ask_links(output, "restore", name)


def _ask_links(output: Path, verb: str, name: str = "") -> None:
    from fednats.testbed import links  # noqa: PLC0415

    print_rows(asyncio.run(links.ask(output, verb, name)), as_json=False)
