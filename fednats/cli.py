"""The command line: ``fednats --help``."""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from fednats import __version__
from fednats.config import AggregatorSettings, CoordinatorSettings, SiteSettings, load
from fednats.errors import ConfigError, FednatsError, InterruptedRunError
from fednats.services.lifecycle import configure_logging

if TYPE_CHECKING:
    from fednats.privacy.audit import Audit
    from fednats.testbed.federation import FederationSettings

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""

app = typer.Typer(
    help="Train one model over many hospitals while every record stays where it is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Measure this machine.", no_args_is_help=True)
app.add_typer(bench, name="bench")
link = typer.Typer(help="See and cut the links of a federation that runs on this machine.", no_args_is_help=True)
app.add_typer(link, name="link")
keys = typer.Typer(help="Make keys, and new ones for an encrypted run.", no_args_is_help=True)
app.add_typer(keys, name="keys")

audit = typer.Typer(help="What left a hospital: check its ledger, and read it.", no_args_is_help=True)
app.add_typer(audit, name="audit")

LedgerFile = Annotated[Path, typer.Argument(metavar="LEDGER", help="such as state/egress-ledger.jsonl")]
SignersFiles = Annotated[
    list[Path] | None,
    typer.Option("--signers", help="the run's signers.toml; again for those of earlier epochs, if keys were changed"),
]
ConfigFile = Annotated[Path, typer.Option("--config", help="settings file (TOML)")]
Output = Annotated[Path, typer.Option(help="folder for everything the run leaves; must not hold a run yet")]
RunsIn = Annotated[Path, typer.Option("--output", help="the --output of a federation that runs now")]
LinkName = Annotated[str, typer.Argument(metavar="NAME", help="a region, a site, or a link as `link show` names it")]
Kits = Annotated[Path, typer.Option("--out", metavar="DIR", help="folder of the kits")]
HePublic = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="public key that the coordinator made itself: `fednats keys new-he`"),
]
Wan = Annotated[
    str | None, typer.Option(metavar="KEY=NUMBER,...", help='every leaf link is like this: "delay_ms=150,mbit=20"')
]
Slow = Annotated[
    list[str] | None, typer.Option(metavar="SITE=FACTORx", help="a site's training takes so many times as long")
]


class Cipher(StrEnum):
    """How deltas travel."""

    BFV = "bfv"
    NONE = "none"


class Mode(StrEnum):
    """When a version is made."""

    ASYNC = "async"
    SYNC = "sync"


@app.command()
def demo(
    task: Annotated[str, typer.Option(help="ct-nodule, breast-cancer or heart")] = "ct-nodule",
    sites: Annotated[int | None, typer.Option(help="number of hospitals  [default: 5; heart: its 4]")] = None,
    regions: Annotated[int, typer.Option(min=1, help="number of regions, each with its own nats-server")] = 2,
    seed: Annotated[int, typer.Option(help="seed of data, training and rounding")] = 7,
    cipher: Annotated[Cipher, typer.Option(help="homomorphic encryption, or none (trusted networks)")] = Cipher.BFV,
    mode: Annotated[Mode, typer.Option(help="async: nobody waits; sync: every version waits for all")] = Mode.ASYNC,
    output: Output = Path("output"),
    data: Annotated[Path | None, typer.Option(help="folder or file with the task's real data")] = None,
    dp: Annotated[bool, typer.Option("--dp", help="differential privacy of each record; docs/privacy.md")] = False,  # noqa: FBT002
    wan: Wan = None,
    slow: Slow = None,
) -> None:
    """Hospitals train one model on this machine: real processes, a real bus, encrypted deltas."""
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
    _run(federation, output, wan, slow)


@app.command()
def run(
    federation: Annotated[Path, typer.Argument(metavar="FEDERATION.toml", help="regions, sites, task, settings")],
    output: Output = Path("output"),
    wan: Wan = None,
    slow: Slow = None,
) -> None:
    """Run your own federation on this machine, as processes; see docs/federation-file.md."""
    from fednats.testbed.federation import load_federation  # noqa: PLC0415

    _run(load_federation(federation), output, wan, slow)


@app.command()
def site(config: ConfigFile) -> None:
    """Run a hospital's daemon."""
    from fednats.services import lifecycle  # noqa: PLC0415
    from fednats.services import site as service  # noqa: PLC0415

    settings = load(config, SiteSettings)
    raise typer.Exit(lifecycle.run("site", settings.site, settings, lambda daemon: service.site(daemon, settings)))


@app.command()
def aggregator(config: ConfigFile) -> None:
    """Run a region's daemon."""
    from fednats.services import aggregator as service  # noqa: PLC0415
    from fednats.services import lifecycle  # noqa: PLC0415

    settings = load(config, AggregatorSettings)
    raise typer.Exit(
        lifecycle.run("aggregator", settings.region, settings, lambda daemon: service.aggregator(daemon, settings))
    )


@app.command()
def coordinator(config: ConfigFile) -> None:
    """Run the daemon at the root."""
    from fednats.services import coordinator as service  # noqa: PLC0415
    from fednats.services import lifecycle  # noqa: PLC0415
    from fednats.subjects import HUB  # noqa: PLC0415

    settings = load(config, CoordinatorSettings)
    raise typer.Exit(lifecycle.run("coordinator", HUB, settings, lambda daemon: service.coordinator(daemon, settings)))


@app.command()
def provision(
    federation: Annotated[Path, typer.Argument(metavar="FEDERATION.toml", help="regions, sites, task, settings")],
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
    """Make a folder for each participant with only what it may hold; see docs/provisioning.md."""
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


@keys.command()
def new(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME...", help="users: site.a, or aggregator.north link.north")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for the seeds")] = Path(),
) -> None:
    """Make keys where they are used; hand in only what is printed: `fednats provision --public-key NAME=U...`."""
    from fednats.provision.new_key import new_key  # noqa: PLC0415

    for name in names:
        typer.echo(f"{name}={new_key(name, out)}")


@keys.command()
def new_he(
    federation: Annotated[Path, typer.Argument(metavar="FEDERATION.toml", help="settings that the keys are made for")],
    epoch: Annotated[int, typer.Option(min=1, help="the epoch that the keys are for; a rotation begins the next")] = 1,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="folder for the keys")] = Path(),
) -> None:
    """Make the keys for homomorphic encryption at the coordinator; hand in the public one: `--he-public FILE`."""
    from fednats.provision.new_key import new_pair  # noqa: PLC0415
    from fednats.testbed.federation import load_federation  # noqa: PLC0415

    held, kept = new_pair(load_federation(federation).delta, epoch, out)
    typer.echo(f"{held} decrypts: it stays with the coordinator\n{kept} is to be handed in: --he-public {kept}")


@keys.command()
def rotate(out: Kits = Path("kits"), he_public: HePublic = None) -> None:
    """Begin a new epoch of homomorphic encryption; what is under way in the old one still counts."""
    from fednats.provision import kits  # noqa: PLC0415

    _print_changed(kits.rotate(out.absolute(), he_public=_he_public(he_public)), out)


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


@bench.command()
def crypto(
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list of rows")] = False,  # noqa: FBT002
) -> None:
    """Time and size of the encrypted delta: 1,000,000 parameters, 5 sites, 8 and 4 bits."""
    from fednats.testbed import bench_crypto  # noqa: PLC0415

    _bench(bench_crypto.run, as_json=as_json)


@bench.command()
def loop(
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list of rows")] = False,  # noqa: FBT002
) -> None:
    """How late each daemon's event loop is while five hospitals train and encrypt."""
    from fednats.testbed import bench_loop  # noqa: PLC0415

    _bench(bench_loop.run, as_json=as_json)


@bench.command()
def wan(
    as_json: Annotated[bool, typer.Option("--json", help="print a JSON list of rows")] = False,  # noqa: FBT002
) -> None:
    """Time to a target, synchronous and asynchronous: on a good net, a bad one, and with a slow hospital."""
    from fednats.testbed import bench_wan  # noqa: PLC0415

    _bench(bench_wan.run, as_json=as_json)


@app.command()
def verify(directory: Annotated[Path, typer.Argument(metavar="DIR", help="output folder of a run")]) -> None:
    """Replay the journals of a run: every accepted update is in one applied sum, or exit code 1; docs/reliability.md."""
    from fednats.testbed import ledger, ledger_table  # noqa: PLC0415

    found = asyncio.run(ledger.settled(directory.resolve()))
    Console().print(ledger_table.table(found))
    for text in (*found.notes, *found.findings, found.line):
        typer.echo(text)
    raise typer.Exit(1 if found.findings else 0)


@audit.command("verify")
def audit_verify(ledger: LedgerFile, signers: SignersFiles = None) -> None:
    """Say whether a ledger is whole and who signed it, or exit code 1 with the place; docs/audit.md."""
    found = _audit(ledger, signers)
    for text in (*found.notes, *found.findings, found.line):
        typer.echo(text)
    raise typer.Exit(1 if found.findings else 0)


@audit.command("show")
def audit_show(
    ledger: LedgerFile,
    html: Annotated[Path | None, typer.Option(help="write a page for a browser instead")] = None,
    signers: SignersFiles = None,
) -> None:
    """Print what is on record, or write it as a page: totals by kind and day, epsilon over time, all records."""
    from fednats.privacy import ledger_page  # noqa: PLC0415

    found = _audit(ledger, signers)
    if html is None:
        Console().print(ledger_page.table(found))
    else:
        try:
            html.write_text(ledger_page.page(found), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{html}: cannot be written ({error.strerror}); give another --html") from error
        typer.echo(f"{html} is written.")
    for text in (*found.findings, found.line):
        typer.echo(text)


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Run the command line; an error of fednats's own is one line, not a traceback."""
    try:
        app()
    except FednatsError as error:
        Console(stderr=True, soft_wrap=True).print(f"fednats: {error}", markup=False, highlight=False)
        raise SystemExit(INTERRUPTED if isinstance(error, InterruptedRunError) else 1) from None


def _run(federation: "FederationSettings", output: Path, wan: str | None, slow: list[str] | None) -> None:
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


def _public_key(text: str) -> tuple[str, str]:
    name, equals, key = text.partition("=")
    if not equals:
        raise ConfigError(f"--public-key {text}: give NAME=U..., as `fednats keys new NAME` prints it")
    return name, key


def _he_public(file: Path | None) -> bytes | None:
    from fednats.services.keys import read_key  # noqa: PLC0415

    return read_key(file, "--he-public")


def _print_changed(changed: Sequence[Path], out: Path) -> None:
    for path in changed:
        typer.echo(path.relative_to(out.absolute()))
    folders = sorted({path.relative_to(out.absolute()).parts[0] for path in changed} - {"authority"})
    typer.echo(f"hand out from {out}: {', '.join(folders)}" if folders else "nothing changed")


def _audit(ledger: Path, signers: list[Path] | None) -> "Audit":
    from fednats.crypto.signers import read_roster  # noqa: PLC0415
    from fednats.privacy.audit import audit as read_and_verify  # noqa: PLC0415

    return read_and_verify(ledger, [read_roster(file) for file in signers or ()])


def _slow(text: str) -> tuple[str, float]:
    site, _, factor = text.rpartition("=")
    try:
        return site, float(factor.removesuffix("x"))
    except ValueError:
        raise ConfigError(f"--slow {text}: give SITE=FACTOR, such as a=10x") from None


def _ask_links(output: Path, verb: str, name: str = "") -> None:
    from fednats.testbed import links  # noqa: PLC0415

    _print_rows(asyncio.run(links.ask(output, verb, name)), as_json=False)


def _bench(measure: Callable[[], Sequence[Mapping[str, object]]], *, as_json: bool) -> None:
    configure_logging("warning")
    _print_rows(measure(), as_json=as_json)


def _print_rows(rows: Sequence[Mapping[str, object]], *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    for row in rows:
        typer.echo("  ".join(f"{name}={value}" for name, value in row.items()))
