"""``fednats provision`` and ``fednats keys``: make kits, and keys that stay with their owner."""

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from fednats.cli.arguments import FederationFile
from fednats.errors import ConfigError

commands = typer.Typer()
keys = typer.Typer(help="Make keys, and new ones for an encrypted run.", no_args_is_help=True)
commands.add_typer(keys, name="keys")

Kits = Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the kits")]
HePublic = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="public key that the coordinator made itself: `fednats keys new-he`"),
]


@commands.command()
def provision(
    federation: FederationFile,
    out: Kits = Path("kits"),
    add_site: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="a site that is new in the file, or gets a new key")
    ] = None,
    add_region: Annotated[list[str] | None, typer.Option(metavar="NAME", help="likewise a region")] = None,
    revoke: Annotated[
        list[str] | None,
        typer.Option(metavar="USER", help="site.NAME, or aggregator.NAME for a region: refused from now on"),
    ] = None,
    public_key: Annotated[
        list[str] | None, typer.Option(metavar="NAME=U...", help="a key whose seed its owner keeps: site.a=U...")
    ] = None,
    he_public: HePublic = None,
) -> None:
    """Make a kit for each participant, with only what that participant may hold.

    Run it again after a change to the federation file; existing keys stay. See docs/provisioning.md.
    """
    from fednats.provision import kits  # noqa: PLC0415
    from fednats.testbed.federation import load_federation  # noqa: PLC0415

    changed = kits.provision(
        load_federation(federation).plan(),
        out.absolute(),
        add_sites=add_site or (),
        add_regions=add_region or (),
        revoke=revoke or (),
        public_keys=dict(map(_public_key, public_key or ())),
        he_public=_he_public(he_public),
    )
    _print_changed(changed, out)
    _print_certificates(out)


@keys.command()
def new(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="users: site.a, or aggregator.north link.north")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for the seeds")] = Path(),
) -> None:
    """Make keys on the machine that uses them.

    Hand in only the lines printed, for `fednats provision --public-key NAME=U...`; the seeds stay.
    """
    from fednats.provision.new_key import new_key  # noqa: PLC0415

    for name in names:
        typer.echo(f"{name}={new_key(name, out)}")


@keys.command()
def new_he(
    federation: Annotated[Path, typer.Argument(metavar="FEDERATION.toml", help="settings that the keys are made for")],
    epoch: Annotated[int, typer.Option(min=1, help="the epoch that the keys are for; a rotation begins the next")] = 1,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for the keys")] = Path(),
) -> None:
    """Make the keys for homomorphic encryption on the coordinator's machine.

    Hand in only the public key, for `--he-public FILE` of `fednats provision` or `fednats keys rotate`.
    """
    from fednats.provision.new_key import new_pair  # noqa: PLC0415
    from fednats.testbed.federation import load_federation  # noqa: PLC0415

    held, kept = new_pair(load_federation(federation).delta, epoch, out)
    typer.echo(f"{held} decrypts: it stays with the coordinator\n{kept} is to be handed in: --he-public {kept}")


@keys.command()
def rotate(out: Kits = Path("kits"), he_public: HePublic = None) -> None:
    """Begin a new epoch with new keys; updates under way for the old epoch still count."""
    from fednats.provision import kits  # noqa: PLC0415

    _print_changed(kits.rotate(out.absolute(), he_public=_he_public(he_public)), out)


def _public_key(text: str) -> tuple[str, str]:
    name, equals, key = text.partition("=")
    if not equals:
        raise ConfigError(f"--public-key {text}: give NAME=U..., as `fednats keys new NAME` prints it")
    return name, key


def _he_public(file: Path | None) -> bytes | None:
    from fednats.services.daemon.keys import read_key  # noqa: PLC0415

    return read_key(file, "--he-public")


def _print_certificates(out: Path) -> None:
    """Print when the certificates end; `provision` renews a server's in its last 90 days if the kit is still there."""
    from fednats.provision.authority import certificates  # noqa: PLC0415

    for path, ends in certificates(out):
        typer.echo(f"{path.relative_to(out)} ends on {ends:%Y-%m-%d}, in {(ends - datetime.now(UTC)).days} days")


def _print_changed(changed: Sequence[Path], out: Path) -> None:
    for path in changed:
        typer.echo(path.relative_to(out.absolute()))
    folders = sorted({path.relative_to(out.absolute()).parts[0] for path in changed} - {"authority"})
    typer.echo(f"hand out from {out}: {', '.join(folders)}" if folders else "nothing changed")
