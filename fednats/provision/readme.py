"""The README of each kit: its files, what to keep secret, how to start, how to check."""

from pathlib import Path

from fednats.permissions import user_name
from fednats.provision import epochs
from fednats.provision.files import Files
from fednats.provision.plan import Kits, Plan
from fednats.provision.registry import Registry
from fednats.subjects import HUB

_PORT = "{web_port}"
_FILES = {
    "ca.pem": "the federation's authority: what the servers' certificates are verified with",
    "signers.toml": "whose signatures count in this federation, and whose no longer do",
    "policy.toml": "what the daemon may do, whatever a run asks for; yours to make stricter",
    "server.conf": "this server's name, addresses and store",
    "accounts.conf": "who may connect here, and what each may do",
    "server.pem": "this server's certificate",
    "server.key": "**secret**: the certificate's key",
    "link.conf": "**secret**: the key that this server shows to the one above",
    "hub.conf": "the server's configuration",
    "leaf.conf": "the server's configuration",
    "coordinator.toml": "settings of the coordinator",
    "initial.safetensors": "**secret**: the weights that the first run begins with",
    "aggregator.toml": "settings of the aggregator",
    "site.toml": "settings of the hospital's daemon",
}


def write(plan: Plan, registry: Registry, kits: Kits, files: Files) -> None:
    """Write ``README.md`` into each kit."""
    run = plan.name
    files.public(kits.authority / "README.md", _AUTHORITY.format(run=run).encode())
    coordinator = _COORDINATOR
    held = epochs.secret_file(registry.epoch)
    if registry.own_pairs and not (kits.coordinator / held).exists():
        coordinator = _MISSING.format(name=held, how="as `fednats keys new-he` wrote it") + coordinator
    name = user_name("coordinator", HUB)
    coordinator = coordinator.replace(_PORT, str(registry.web_ports[name]))
    _write(kits.coordinator, f"The coordinator of {run}", [name], kits, files, coordinator)
    hub = _SERVER.format(config="hub.conf", monitor=plan.server(HUB).monitor_url)
    _write(kits.server(HUB), f"The hub of {run}", [user_name("observer", HUB)], kits, files, hub)
    for region in plan.regions:
        text = _AGGREGATOR.replace(_PORT, str(registry.web_ports[user_name("aggregator", region.name)]))
        if plan.leaves:
            text += "\n" + _SERVER.format(config="leaf.conf", monitor=plan.server(region.name).monitor_url)
        users = plan.users_of_region(region.name)
        _write(kits.region(region.name), f"The region {region.name} of {run}", users, kits, files, text)
        for site in region.sites:
            name = user_name("site", site)
            if name in registry.keys:
                _write(
                    kits.site(site),
                    f"The hospital {site} in {run}",
                    [name],
                    kits,
                    files,
                    _SITE.replace(_PORT, str(registry.web_ports[name])),
                )


def _write(kit: Path, title: str, users: list[str] | tuple[str, ...], kits: Kits, files: Files, text: str) -> None:
    rows = [f"| `{path.name}` | {what} |" for path in sorted(kit.iterdir()) if (what := _what(path))]
    elsewhere = [kits.seed_file(user) for user in users if not kits.seed_file(user).exists()]
    missing = "".join(_MISSING.format(name=path.name, how=_how(path)) for path in elsewhere)
    listed = "\n".join(("| file | what it is |", "|---|---|", *rows))
    files.public(kit / "README.md", f"# {title}\n\n{listed}\n\n{_KEEP}{missing}\n{text}".encode())


def _what(path: Path) -> str | None:
    name = path.name
    if name in _FILES:
        return _FILES[name]
    if name.endswith(".nk"):
        holder = "this daemon" if not name.startswith("observer") else "who watches with the `nats` CLI"
        return f"**secret**: the key of {holder}, to connect and to sign with"
    if name.startswith("model-"):
        return "**secret**: opens the models of its epoch, which only the coordinator and the hospitals may read"
    if name.endswith(".secret"):
        return "**secret**: decrypts sums of hospitals"
    if name.endswith(".public"):
        return "encrypts and adds; cannot decrypt"
    is_code = path.suffix in {".py", ".whl"} or (path / "__init__.py").is_file()
    return "the task: the code that is trained with" if is_code else None


def _how(path: Path) -> str:
    return 'as `link_seed: "SU..."`' if path.suffix == ".conf" else "as `fednats keys new` wrote it"


_KEEP = """Secret files are readable by their owner only (0600) and have to stay closed, or no daemon starts. Copy the folder over a channel you trust, to the
machine that runs it, and keep no second copy.
"""

_MISSING = """
`{name}` is not in this kit: its key was made where it is used, and only the public half was handed in. Put it here
under that name, {how}, mode 0600.
"""

_COORDINATOR = """## Start

    fednats coordinator --config coordinator.toml

from any folder; what it remembers goes to `state/` here. It needs the hub's server.

The run in `coordinator.toml` begins with the first start. When it is closed, start the next one, or let it go on:

    fednats run start RUN.toml --config coordinator.toml
    fednats run extend --versions 20 --config coordinator.toml
    fednats run list --config coordinator.toml

## Check

The log says `started`, then `bus_connected`, and

    curl -s http://127.0.0.1:{web_port}/readyz

says `ready`. `/status` there says more, and `/metrics` is for Prometheus. `epoch-*.secret` and the regions' ciphertexts together would open single hospitals' updates: never give it to a region.
"""

_AGGREGATOR = """## Start the aggregator

    fednats aggregator --config aggregator.toml

from any folder; what it remembers goes to `state/` here. It cannot decrypt what it adds, nor read the models.

## Check the aggregator

    curl -s http://127.0.0.1:{web_port}/readyz

says `ready`. `/status` there names the hospitals that are missing (`sources`), and `/metrics` is for Prometheus.
"""

_SERVER = """## Start the server

In this folder:

    nats-server -c {config}

What it stores goes to `store/` here. When `accounts.conf` changes, copy it here and, in this folder,

    nats-server --signal reload=server.pid
    sleep 2
    nats-server --signal reload=server.pid

Twice, because only the second time the server lets those in whom the file did not have before.

## Check

    curl -s {monitor}/healthz
    curl -s {monitor}/leafz

Monitoring is on this machine only. Without TLS nobody gets as much as a greeting: that is meant so.
"""

_SITE = """## Start

Set `task.options` in `site.toml` to where your data is (whole paths), then, from any folder:

    fednats site --config site.toml

What it remembers goes to `state/` here. It connects outwards only, to the address in `[bus]`.

A `[budget]` in `policy.toml` limits what all runs together may learn of a record. They need one account for that: name its file
there, outside this folder and the same in every kit that trains on your data,

    privacy_account = "/var/lib/fednats/privacy.sqlite"

Without that line a daemon with a budget does not start. `policy.toml` is yours: no later kit may replace it.

## Check

The log says `started`, then `bus_connected`, and

    curl -s http://127.0.0.1:{web_port}/readyz

says `ready`. `/status` there says more, and `/metrics` is for Prometheus. What it sends is encrypted for the coordinator; nothing here can decrypt it.
"""

_AUTHORITY = """# Who provisioned {run}

**Keep this folder offline and give it to nobody.** Every kit can be brought up to date from it.

| file | what it is |
|---|---|
| `ca.key` | **secret**: makes certificates for this federation's servers |
| `ca.pem` | its certificate, in every kit |
| `model-*.key` | **secret**: what coordinator and hospitals open models with, one for each epoch |
| `registry.toml` | everybody's public key, and those that were revoked |
| `plan.json` | the federation as it was provisioned last |
| `epoch-*.public` | the public keys for homomorphic encryption; the secret ones are in the coordinator's kit only |

When the kits are handed out, delete them here. A later `fednats provision` knows the public keys, makes no second ones, and
writes anew what may be handed out again.
"""
