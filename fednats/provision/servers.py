"""The server files in a kit: configuration, accounts, certificate."""

import json
from pathlib import Path

import fednats
from fednats.errors import ConfigError
from fednats.provision import accounts
from fednats.provision.authority import Authority
from fednats.provision.files import Files
from fednats.provision.plan import Kits, Plan
from fednats.provision.registry import Registry
from fednats.subjects import HUB
from fednats.transport import streams


def config_file(name: str) -> Path:
    """Return the path of ``hub.conf`` or ``leaf.conf``, in the installed package or in a checkout.

    Raises:
        ConfigError: the file is in neither place.
    """
    package = Path(fednats.__file__).parent
    for folder in (package / "bus", package.parent / "bus"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"{name} is neither in {package / 'bus'} nor in {package.parent / 'bus'}; reinstall fednats")


def write_hub(plan: Plan, kits: Kits, registry: Registry, authority: Authority, files: Files) -> None:
    """Write the hub's server files."""
    _write(plan, HUB, "hub.conf", accounts.of_hub(plan, registry).render(), kits, authority, files)


def write_leaf(plan: Plan, region: str, kits: Kits, registry: Registry, authority: Authority, files: Files) -> None:
    """Write the server files of a region."""
    text = accounts.of_leaf(plan, plan.region(region), registry).render(region)
    _write(plan, region, "leaf.conf", text, kits, authority, files)


def server_conf(plan: Plan, node: str) -> str:
    """Return ``server.conf``, the values that ``hub.conf`` and ``leaf.conf`` refer to."""
    server = plan.server(node)
    values = {
        "bus_name": node,
        "bus_listen": f"{server.listens_on}:{server.port}",
        "bus_leaf_listen": f"{server.listens_on}:{server.leaf_port}",
        "bus_monitor": server.monitor_url.removeprefix("http://"),
        "bus_store": "store",
        **({} if node == HUB else {"bus_upstream": plan.upstream(node)}),
    }
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())
    return f"{text}bus_max_store: {server.max_store}\n"  # no quotes, or the server would not read it as a size


def check_stores(plan: Plan) -> None:
    """Check that each server's ``max_store`` covers its streams; if not, services could not create them.

    Raises:
        ConfigError: a server's limit is too small; the text names the setting and the size needed.
    """
    for node in (HUB, *(region.name for region in plan.regions if plan.leaves)):
        needed, given = store_bytes(plan, node), _bytes_of(plan.server(node).max_store)
        if needed > given:
            section = "bus" if node == HUB else f"regions.{node}.bus"
            raise ConfigError(
                f'[{section}] max_store = "{plan.server(node).max_store}": the streams of this server may take'
                f" {needed / 2**30:.1f} GiB together; give {-(-needed // 2**30)}GB or more (it is a limit, and takes no disk"
                " by itself)"
            )


def store_bytes(plan: Plan, node: str) -> int:
    """Return the total size limit, in bytes, of a run's streams and buckets at the server of ``node``."""
    run = plan.name
    made: list[streams.StreamSpec | streams.BucketSpec] = []
    if node == HUB:
        made += [*streams.at_hub(run, plan.children_of(None), leaves=plan.leaves), *streams.buckets(run)]
    for region in plan.regions:
        if not plan.leaves or region.name == node:
            children = plan.children_of(region.name)
            made += streams.at_uplink(run, region.name, region.parent, children, leaves=plan.leaves)
            made += streams.in_region(run, region.name, region.sites, leaves=plan.leaves)
            made += [*streams.buckets(run), *([streams.presence(run)] if children else [])]
    return streams.needed_bytes(made)


def _bytes_of(size: str) -> int:
    """Return a nats-server size in bytes; for nats-server, 1 KB is 1024 bytes.

    >>> _bytes_of("20GB") == 20 * 2**30
    True
    """
    return int(size[:-2]) << 10 * (1 + "KMGT".index(size[-2]))


def _write(plan: Plan, node: str, config: str, text: str, kits: Kits, authority: Authority, files: Files) -> None:
    kit = kits.server(node)
    files.public(kit / config, config_file(config).read_bytes())
    files.public(kit / "server.conf", server_conf(plan, node).encode())
    files.private(kit / "accounts.conf", text.encode())
    authority.certify(kit, node, plan.server(node).hosts, links_up=node != HUB)
