"""``fednats link``: see and cut links."""

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
    """Print each link, its settings, whether it is up, and what has crossed it."""
    _ask_links(output, "show")


@link.command()
def cut(name: LinkName, output: RunsIn = Path("output")) -> None:
    """Let every packet on a link vanish."""
    _ask_links(output, "cut", name)


@link.command()
def restore(name: LinkName, output: RunsIn = Path("output")) -> None:
    """Mend a link; connections that lived through the cut are reset."""
    _ask_links(output, "restore", name)


def _ask_links(output: Path, verb: str, name: str = "") -> None:
    from fednats.testbed import links  # noqa: PLC0415

    print_rows(asyncio.run(links.ask(output, verb, name)), as_json=False)
