"""``fednats site``, ``aggregator`` and ``coordinator``: the daemons."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fednats.cli.errors import report
from fednats.config import AggregatorSettings, CoordinatorSettings, SiteSettings, load
from fednats.errors import ConfigError

commands = typer.Typer()

ConfigFile = Annotated[Path, typer.Option("--config", help="settings file (TOML)")]


@contextmanager
def supervised() -> Iterator[None]:
    """Exit with a code of its own on a ConfigError, so that a supervisor does not restart the daemon in vain."""
    try:
        yield
    except ConfigError as error:
        report(error)
        raise typer.Exit(error.exit_code) from None


@commands.command()
def site(config: ConfigFile) -> None:
    """Run a hospital's daemon: it trains on the hospital's data and sends encrypted updates."""
    from fednats.services.daemon import lifecycle  # noqa: PLC0415
    from fednats.services.site import service  # noqa: PLC0415

    with supervised():
        settings = load(config, SiteSettings)
        raise typer.Exit(lifecycle.run("site", settings.site, settings, lambda daemon: service.site(daemon, settings)))


@commands.command()
def aggregator(config: ConfigFile) -> None:
    """Run a region's daemon: it adds up encrypted updates that it cannot read."""
    from fednats.services.aggregator import service  # noqa: PLC0415
    from fednats.services.daemon import lifecycle  # noqa: PLC0415

    with supervised():
        settings = load(config, AggregatorSettings)
        raise typer.Exit(
            lifecycle.run(
                "aggregator", settings.region, settings, lambda daemon: service.aggregator(daemon, settings, config)
            )
        )


@commands.command()
def coordinator(config: ConfigFile) -> None:
    """Run the coordinator's daemon: it decrypts sums and publishes the versions of the model."""
    from fednats.services.coordinator import service  # noqa: PLC0415
    from fednats.services.daemon import lifecycle  # noqa: PLC0415
    from fednats.subjects import HUB  # noqa: PLC0415

    with supervised():
        settings = load(config, CoordinatorSettings)
        raise typer.Exit(
            lifecycle.run("coordinator", HUB, settings, lambda daemon: service.coordinator(daemon, settings))
        )
