"""A leaf server run by somebody who has a region's kit and keeps to no rule: its one user may do everything there."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fednats import permissions
from fednats.config import BusSettings, parse
from fednats.permissions import Permissions, User
from fednats.provision import nkey
from fednats.provision.authority import CA_FILE
from fednats.provision.plan import LeafAddress, Plan, RegionPlan
from fednats.provision.servers import server_conf
from fednats.testbed.nats_server import NatsServer, Ports
from tests.support.connected_bus import ConnectedBus


def all_powerful(name: str, folder: Path, *, leaf: bool = False) -> User:
    """A user who may do everything, with a new key in ``folder``."""
    seed = nkey.new_seed()
    folder.mkdir(exist_ok=True, parents=True)
    (folder / f"{name}.nk").write_text(seed)
    return User(name, nkey.public_key(seed), Permissions(publish=(">",), subscribe=(">",)), leaf=leaf)


@asynccontextmanager
async def rogue_leaf(bus: ConnectedBus, region: str, folder: Path) -> AsyncIterator[BusSettings]:
    """Start it with the link's key of ``region``, directly below the hub; yield what its user connects with."""
    kit = folder / "rogue"
    await asyncio.to_thread(
        shutil.copytree, bus.servers.kits.region(region), kit, ignore=shutil.ignore_patterns("store")
    )
    user = all_powerful(permissions.user_name("uplink", region), folder)
    everything = {"publish": {"allow": [">"]}, "subscribe": {"allow": [">"]}}
    users = [{"nkey": user.public_key, "permissions": everything}]
    accounts = {"UPLINK": {"jetstream": "enabled", "users": users}, "REGION": {"users": []}}
    (kit / "accounts.conf").write_text(f"deny_imports: []\naccounts: {json.dumps(accounts)}\n")
    ports = Ports(3)
    address = LeafAddress(
        **dict(zip(("port", "leaf_port", "monitor_port"), ports.numbers, strict=True)),
        upstream=bus.servers.hub.leaf_url,
    )
    raw = {
        "run": {"name": bus.servers.run, "delta": {"cipher": "none"}},
        "regions": (RegionPlan("rogue", ("x",), bus=address),),
        "task": {"path": "breast-cancer"},
    }
    plan = parse(raw, Plan, source="test")
    (kit / "server.conf").write_text(server_conf(plan, "rogue"))
    server = NatsServer(plan.server("rogue"), kit, ports)
    async with server:
        yield BusSettings(url=server.url, ca_file=kit / CA_FILE, nkey_seed_file=folder / f"{user.name}.nk")
