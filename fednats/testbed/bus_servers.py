"""The servers of a whole federation on this machine, from the same kits as in the field."""

import asyncio
import zlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from fednats import permissions
from fednats.config import (
    AggregatorSettings,
    BusSettings,
    CoordinatorSettings,
    DeltaSettings,
    RunSettings,
    SiteSettings,
    TaskSettings,
    WebSettings,
    load,
    parse,
)
from fednats.errors import BusError, ConfigError
from fednats.provision.authority import CA_FILE
from fednats.provision.kits import provision
from fednats.provision.plan import Kits, LeafAddress, Plan, RegionPlan, ServerAddress
from fednats.provision.services import SIGNERS_FILE
from fednats.services.daemon.identity import Identity
from fednats.subjects import HUB
from fednats.testbed.nats_server import NatsServer, Ports
from fednats.testbed.wan import Wan, WanSettings

LINK_TIMEOUT_S = 60.0
_POLL_S = 0.02
ANY_WEB_PORT: Mapping[str, WebSettings] = {"web": WebSettings()}
"""Replaces the port in the kit, because several federations may run on this machine."""


@dataclass
class BusServers:
    """The running servers of a federation, and the settings that each participant connects with.

    Settings come from the kits. A participant with a link in front of its server connects to the link.
    """

    run: str
    plan: Mapping[str, RegionPlan]
    kits: Kits
    hub: NatsServer
    leaves: dict[str, NatsServer] = field(default_factory=dict)
    """Leaf server by region; empty without leaves."""
    links: dict[str, Wan] = field(default_factory=dict)
    """Link by name; see `link_names`."""

    @property
    def servers(self) -> tuple[NatsServer, ...]:
        """All servers, the hub first."""
        return (self.hub, *self.leaves.values())

    def identity(self, role: str, node: str) -> Identity:
        """Return a participant's identity, to sign in its name."""
        name = permissions.user_name(role, node)
        return Identity(name, self.run, self.kits.seed_file(name), self.signers_file(role, node))

    def signers_file(self, role: str, node: str) -> Path:
        """Return the path of ``signers.toml`` in a participant's kit."""
        return self.kits.seed_file(permissions.user_name(role, node)).with_name(SIGNERS_FILE)

    def coordinator_settings(self) -> CoordinatorSettings:
        """Return the settings in the coordinator's kit."""
        settings = load(self.kits.coordinator / "coordinator.toml", CoordinatorSettings, {})
        return settings.model_copy(update={"bus": self._linked(settings.bus, "coordinator"), **ANY_WEB_PORT})

    def aggregator_settings(self, region: str) -> AggregatorSettings:
        """Return the settings in a region's kit."""
        settings = load(self.kits.region(region) / "aggregator.toml", AggregatorSettings, {})
        bus, uplink = settings.bus, settings.uplink
        linked = {"bus": self._linked(bus, f"aggregator-{region}"), "uplink": self._linked(uplink, f"uplink-{region}")}
        return settings.model_copy(update={**linked, **ANY_WEB_PORT})

    def site_settings(self, site: str) -> SiteSettings:
        """Return the settings in a hospital's kit."""
        settings = load(self.kits.site(site) / "site.toml", SiteSettings, {})
        return settings.model_copy(update={"bus": self._linked(settings.bus, f"site-{site}"), **ANY_WEB_PORT})

    def coordinator(self) -> BusSettings:
        """Return the coordinator's connection."""
        return self.coordinator_settings().bus

    def uplink(self, region: str) -> BusSettings:
        """Return the aggregator's connection to the uplink account (without leaves: the hub's account)."""
        return self.aggregator_settings(region).uplink

    def aggregator(self, region: str) -> BusSettings:
        """Return the aggregator's connection to its region's private account."""
        return self.aggregator_settings(region).bus

    def site(self, region: str, site: str) -> BusSettings:
        """Return the connection of a site of ``region``.

        Raises:
            ConfigError: the site is in another region.
        """
        settings = self.site_settings(site)
        if settings.region != region:
            raise ConfigError(f"site {site} is in {settings.region}, not in {region}")
        return settings.bus

    def observer(self, node: str) -> BusSettings:
        """Return the connection of the read-only observer of the hub (`HUB`) or of a region."""
        return self.user("observer", node)

    def user(self, role: str, node: str) -> BusSettings:
        """Return the connection of any bus user, to the server of its node, without a link in between."""
        server = self.hub if node == HUB else self.node(node)
        seed = self.kits.seed_file(permissions.user_name(role, node))
        return BusSettings(url=server.url, ca_file=self.kits.server(HUB) / CA_FILE, nkey_seed_file=seed)

    def node(self, region: str) -> NatsServer:
        """Return the server that a region's services connect to."""
        return self.leaves.get(region, self.hub)

    def _linked(self, bus: BusSettings, link: str) -> BusSettings:
        return bus.model_copy(update={"url": self.links[link].url}) if link in self.links else bus


@asynccontextmanager
async def bus_servers(
    directory: Path,
    run: str,
    regions: Sequence[RegionPlan],
    *,
    leaves: bool = True,
    links: Mapping[str, WanSettings] | None = None,
) -> AsyncIterator[BusServers]:
    """Start the servers of an unencrypted federation, with its kits below ``directory``; see `serving`."""
    plan = {
        "run": RunSettings(name=run, delta=DeltaSettings(cipher="none")),
        "regions": tuple(regions),
        "leaves": leaves,
        "task": TaskSettings(path="breast-cancer"),
    }
    async with serving(parse(plan, Plan, source="plan"), directory / "kits", links) as servers:
        yield servers


@asynccontextmanager
async def serving(
    plan: Plan, folder: Path, links: Mapping[str, WanSettings] | None = None
) -> AsyncIterator[BusServers]:
    """Provision ``plan`` on this machine; start the hub and, with leaves, one leaf per region.

    ``folder`` gets the kits, and each server runs in its kit. ``links`` puts a `Wan` on the connections that it names;
    see `link_names`.

    Raises:
        ConfigError: there is no nats-server binary, or ``links`` names an unknown link.
        BusError: a server or a leaf link does not come up; the text has the end of the log, or its path.
    """
    links = links or {}
    names = link_names(plan.regions, leaves=plan.leaves)
    if unknown := [name for name in links if name not in names]:
        raise ConfigError(f"there is no link {unknown[0]!r}; there are {', '.join(names)}")
    async with AsyncExitStack() as stack:
        nodes = (HUB, *(region.name for region in plan.regions)) if plan.leaves else (HUB,)
        ports = {node: Ports(3) for node in nodes}
        for reserved in ports.values():
            stack.callback(reserved.release)
        plan = _on_ports(plan, ports)
        wans = {name: _wan(name, settings, plan, names[name]) for name, settings in links.items()}
        for wan in wans.values():
            await stack.enter_async_context(wan)
        plan = _through(plan, wans)
        kits = Kits(folder)
        await asyncio.to_thread(provision, plan, folder)
        hub = await stack.enter_async_context(NatsServer(plan.server(HUB), kits.server(HUB), ports[HUB]))
        servers = BusServers(plan.name, {region.name: region for region in plan.regions}, kits, hub, links=wans)
        order = plan.top_down() if plan.leaves else ()
        for region in order:
            server = NatsServer(plan.server(region.name), kits.server(region.name), ports[region.name])
            servers.leaves[region.name] = await stack.enter_async_context(server)
        for region in order:
            await _linked(servers, region)
        yield servers


def region_link(region: str) -> str:
    """Return the name of a region's leaf link."""
    return f"region-{region}"


def link_names(regions: Sequence[RegionPlan], *, leaves: bool) -> dict[str, str]:
    """Return the names of all connections that can have a `Wan`, each with the node that it leads to.

    ``region-NAME`` is a leaf link. The others are connections of participants: ``site-NAME``, ``aggregator-REGION`` (to
    its private account), ``uplink-REGION``, ``coordinator``.
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
    """Wait until a region's leaf link is up and interest has crossed it both ways; do not wait if the link is cut.

    If a copy is requested earlier, JetStream tries it again only after 40 s.
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


def _wan(name: str, settings: WanSettings, plan: Plan, node: str) -> Wan:
    server = plan.server(node)
    port = server.leaf_port if name.startswith(region_link("")) else server.port
    return Wan(settings, server.host, port, name=name, seed=zlib.crc32(name.encode()))


def _on_ports(plan: Plan, ports: Mapping[str, Ports]) -> Plan:
    """Return the plan with every server on this machine, on free ports."""

    def address(node: str) -> dict[str, int]:
        return dict(zip(("port", "leaf_port", "monitor_port"), ports[node].numbers, strict=True))

    regions = plan.regions
    if plan.leaves:
        regions = tuple(replace(region, bus=LeafAddress(**address(region.name))) for region in regions)
    return plan.model_copy(update={"bus": ServerAddress(**address(HUB)), "regions": regions})


def _through(plan: Plan, wans: Mapping[str, Wan]) -> Plan:
    """Return the plan with its leaf links led through their proxies."""

    def upstream(region: RegionPlan) -> RegionPlan:
        wan = wans.get(region_link(region.name))
        if wan is None:
            return region
        return replace(region, bus=region.bus.model_copy(update={"upstream": wan.url}))

    return plan.model_copy(update={"regions": tuple(map(upstream, plan.regions))})
