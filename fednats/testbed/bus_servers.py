"""The servers of a whole federation, with keys for everybody."""

import asyncio
import os
import zlib
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import nkeys
import tomli_w

from fednats import permissions
from fednats.config import BusSettings
from fednats.crypto.signing import Signer
from fednats.errors import BusError, ConfigError
from fednats.permissions import Account, Permissions, User
from fednats.services.identity import Identity
from fednats.subjects import HUB
from fednats.testbed.nats_server import NatsServer, write_secret
from fednats.testbed.wan import Wan, WanSettings

LINK_TIMEOUT_S = 60.0
_POLL_S = 0.02


@dataclass(frozen=True)
class RegionPlan:
    """One region of a federation; ``parent`` is the region above it, none the hub."""

    name: str
    sites: tuple[str, ...] = ()
    parent: str | None = None


@dataclass
class BusServers:
    """The running servers of a federation, and the settings each participant connects with."""

    run: str
    plan: Mapping[str, RegionPlan]
    keys: "Keys"
    hub: NatsServer
    leaves: dict[str, NatsServer] = field(default_factory=dict)
    """By region; empty without leaves."""
    links: dict[str, Wan] = field(default_factory=dict)
    """By name: ``region-NAME`` is its leaf link; the others are a participant's connection, see `link_names`."""

    @property
    def signers_file(self) -> Path:
        """The public keys of all participants."""
        return self.keys.signers_file

    def identity(self, role: str, node: str) -> Identity:
        """Return who a participant is: for what signs in its name."""
        name = permissions.user_name(role, node)
        return Identity(name, self.run, self.keys.seed_file(name), self.signers_file)

    def coordinator(self) -> BusSettings:
        """Return what the coordinator connects with."""
        return self._settings(self.hub, "coordinator", HUB, link="coordinator")

    def uplink(self, region: str) -> BusSettings:
        """Return the aggregator's connection to the uplink account (without leaves: the hub's account)."""
        return self._settings(self.node(region), "uplink", region, link=f"uplink-{region}")

    def aggregator(self, region: str) -> BusSettings:
        """Return the aggregator's connection to its region's private account."""
        return self._settings(self.node(region), "aggregator", region, link=f"aggregator-{region}")

    def site(self, region: str, site: str) -> BusSettings:
        """Return what a site connects with."""
        return self._settings(self.node(region), "site", site, link=f"site-{site}")

    def observer(self, node: str) -> BusSettings:
        """Return the read-only user of the hub's account (`HUB`) or of a region's private account."""
        return self._settings(self.hub if node == HUB else self.node(node), "observer", node)

    def node(self, region: str) -> NatsServer:
        """Return the server that a region's services connect to."""
        return self.leaves.get(region, self.hub)

    def _settings(self, server: NatsServer, role: str, node: str, link: str = "") -> BusSettings:
        url = self.links[link].url if link in self.links else server.url
        return BusSettings(url=url, nkey_seed_file=self.keys.seed_file(permissions.user_name(role, node)))


class Keys:
    """Seed files of bus users, made when first asked for; each at mode 0600."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def seed_file(self, name: str) -> Path:
        """Return the seed file of the user ``name``."""
        path = self._directory / f"{name}.nk"
        if not path.exists():
            write_secret(path, nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
        return path

    def seed(self, name: str) -> str:
        """Return the seed of the user ``name``."""
        return self.seed_file(name).read_text(encoding="utf-8")

    def public_key(self, name: str) -> str:
        """Return the public key of the user ``name``."""
        return Signer(self.seed(name)).public_key

    def user(self, role: str, node: str, allowed: Permissions) -> User:
        """Return the user with its public key."""
        name = permissions.user_name(role, node)
        return User(name, self.public_key(name), allowed, leaf=role == "link")

    @property
    def signers_file(self) -> Path:
        """Where the public keys of all participants are."""
        return self._directory / "signers.toml"

    def write_signers(self, run: str, plan: Iterable[RegionPlan]) -> None:
        """Write the public keys of all participants."""
        names = [permissions.user_name("coordinator", HUB)]
        for region in plan:
            names.append(permissions.user_name("aggregator", region.name))
            names += [permissions.user_name("site", site) for site in region.sites]
        roster = {"run": run, "epoch": 1, "keys": {name: self.public_key(name) for name in names}}
        self.signers_file.write_text(tomli_w.dumps(roster), encoding="utf-8")


@asynccontextmanager
async def bus_servers(
    directory: Path,
    run: str,
    regions: Sequence[RegionPlan],
    *,
    leaves: bool = True,
    links: Mapping[str, WanSettings] | None = None,
) -> AsyncIterator[BusServers]:
    """Start the hub and (with ``leaves``) one leaf per region; keys, stores and logs go below ``directory``.

    ``links`` puts a `Wan` on the connections it names, see `link_names`.

    Raises:
        ConfigError: no nats-server binary, a plan with an unknown or circular parent, or a link that is none.
        BusError: a server does not come up; the text has the end of its log.
    """
    plan = {region.name: region for region in regions}
    keys = Keys(directory / "keys")
    order = _top_down(plan)
    if not leaves and any(region.parent for region in regions):
        raise ConfigError("regions under regions need leaves")
    keys.write_signers(run, regions)
    links = links or {}
    names = link_names(regions, leaves=leaves)
    if unknown := [name for name in links if name not in names]:
        raise ConfigError(f"there is no link {unknown[0]!r}; there are {', '.join(names)}")
    async with AsyncExitStack() as stack:
        text = permissions.render(_hub(run, plan, keys, leaves=leaves))
        hub = await stack.enter_async_context(NatsServer(HUB, "hub.conf", text, directory / HUB))
        servers = BusServers(run, plan, keys, hub)
        for region in order if leaves else ():
            text = permissions.render(
                _leaf(run, region, plan, keys),
                region=region.name,
                link_seed=keys.seed(permissions.user_name("link", region.name)),
            )
            above = servers.leaves[region.parent] if region.parent else hub
            upstream, link = above.leaf_url, region_link(region.name)
            if link in links:
                servers.links[link] = wan = await stack.enter_async_context(_wan(link, links[link], upstream))
                upstream = wan.url
            server = NatsServer(region.name, "leaf.conf", text, directory / region.name, upstream=upstream)
            servers.leaves[region.name] = await stack.enter_async_context(server)
        for region in order if leaves else ():
            await _linked(servers, region)
        for link, settings in links.items():
            if link not in servers.links:
                target = servers.node(names[link]).url
                servers.links[link] = await stack.enter_async_context(_wan(link, settings, target))
        yield servers


def region_link(region: str) -> str:
    """Return the name of a region's leaf link."""
    return f"region-{region}"


def link_names(regions: Sequence[RegionPlan], *, leaves: bool) -> dict[str, str]:
    """Return the names of all connections a `Wan` can be on, each with the node that it goes to.

    ``region-NAME`` is a leaf link. The others are a participant's: ``site-NAME``, ``aggregator-REGION`` (to its private
    account), ``uplink-REGION``, ``coordinator``.
    """
    names = {"coordinator": HUB}
    for region in regions:
        if leaves:
            names[region_link(region.name)] = region.parent or HUB
        participants = (
            f"aggregator-{region.name}",
            f"uplink-{region.name}",
            *(f"site-{site}" for site in region.sites),
        )
        names |= dict.fromkeys(participants, region.name)
    return names


async def _linked(servers: BusServers, region: RegionPlan) -> None:
    """Wait until a region's leaf link stands and interest has crossed it both ways; not while it is cut.

    JetStream tries a copy that is asked for earlier again after 40 s only.
    """
    below, wan = servers.leaves[region.name], servers.links.get(region_link(region.name))
    above = servers.node(region.parent or HUB)
    try:
        async with asyncio.timeout(LINK_TIMEOUT_S):
            while wan is None or not wan.is_cut:
                down, up = await below.interest_over_links(), await above.interest_over_links()
                if down.get(above.name) and up.get(below.name):
                    return
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        text = f"the leaf link of {region.name} does not stand after {LINK_TIMEOUT_S:.0f} s; see {below.log_file}"
        raise BusError(text) from None


def _wan(name: str, settings: WanSettings, url: str) -> Wan:
    target = urlsplit(url)
    return Wan(settings, target.hostname or "", target.port or 0, name=name, seed=zlib.crc32(name.encode()))


def _hub(run: str, plan: Mapping[str, RegionPlan], keys: Keys, *, leaves: bool) -> list[Account]:
    users = [
        keys.user("coordinator", HUB, permissions.coordinator(run)),
        keys.user("observer", HUB, permissions.observer(run, HUB)),
    ]
    if leaves:
        return [permissions.hub_account(run, [*users, *_links(run, None, plan, keys)])]
    users += [keys.user("uplink", name, permissions.uplink(run, name)) for name in plan]
    private = [
        permissions.private_account(run, region.name, _private_users(run, region, keys), leaves=False)
        for region in plan.values()
    ]
    return [permissions.hub_account(run, users, private), *private]


def _leaf(run: str, region: RegionPlan, plan: Mapping[str, RegionPlan], keys: Keys) -> list[Account]:
    above_regions = any(other.parent == region.name for other in plan.values())
    uplink = keys.user("uplink", region.name, permissions.uplink(run, region.name, above_regions=above_regions))
    return [
        permissions.uplink_account(run, region.name, [uplink, *_links(run, region.name, plan, keys)]),
        permissions.private_account(run, region.name, _private_users(run, region, keys)),
    ]


def _private_users(run: str, region: RegionPlan, keys: Keys) -> list[User]:
    return [
        keys.user("aggregator", region.name, permissions.aggregator(run, region.name)),
        keys.user("observer", region.name, permissions.observer(run, region.name)),
        *(keys.user("site", site, permissions.site(run, region.name, site)) for site in region.sites),
    ]


def _links(run: str, node: str | None, plan: Mapping[str, RegionPlan], keys: Keys) -> list[User]:
    return [
        keys.user("link", child, permissions.link(run, child, node or HUB, _below(child, plan)))
        for child, region in plan.items()
        if region.parent == node
    ]


def _below(name: str, plan: Mapping[str, RegionPlan]) -> list[str]:
    children = [child for child, region in plan.items() if region.parent == name]
    return [*children, *(node for child in children for node in _below(child, plan))]


def _top_down(plan: Mapping[str, RegionPlan]) -> list[RegionPlan]:
    order: list[RegionPlan] = []
    while len(order) < len(plan):
        placed = {None, *(region.name for region in order)}
        ready = [region for name, region in plan.items() if name not in placed and region.parent in placed]
        if not ready:
            raise ConfigError(f"a region's parent is unknown or circular among {sorted(plan)}")
        order += ready
    return order
