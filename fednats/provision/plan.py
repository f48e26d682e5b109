"""Who takes part in a federation and where its servers are; kits are made from this."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from fednats.config import RegisteredSamples, RunSettings, Settings, TaskSettings
from fednats.names import ChosenName
from fednats.permissions import user_name
from fednats.privacy.policy import Policy
from fednats.subjects import HUB

LOOPBACK = "127.0.0.1"
CLIENT_PORT, LEAF_PORT, MONITOR_PORT = 4222, 7422, 8222


class ServerAddress(Settings):
    """Address of a nats-server: ``[bus]`` in a federation file for the hub, ``[regions.NAME.bus]`` for a region."""

    host: str = Field(LOOPBACK, pattern=r"^[A-Za-z0-9.-]+$", description="name or IPv4 address, as others reach it")
    port: int | None = Field(None, ge=1, le=65535, description="for services; none: 4222")
    leaf_port: int | None = Field(None, ge=1, le=65535, description="for the servers of regions below; none: 7422")
    monitor_port: int | None = Field(None, ge=1, le=65535, description="monitoring, on loopback only; none: 8222")
    max_store: str = Field("1TB", pattern=r"^\d+[KMGT]B$", description="most that all its streams may be allowed")


class LeafAddress(ServerAddress):
    """Address of a region's server, and of the server above as seen from there."""

    upstream: str | None = Field(
        None,
        pattern=r"^tls://[A-Za-z0-9.-]+:\d+$",
        description="where the server above is reached from here, if not at its own address (a VPN, a proxy)",
    )


@dataclass(frozen=True)
class Server:
    """One server's name and addresses, with all ports."""

    name: str
    host: str
    port: int
    leaf_port: int
    monitor_port: int
    max_store: str
    also: tuple[str, ...] = ()
    """Other host names that reach it."""

    @property
    def url(self) -> str:
        """URL that services connect to."""
        return f"tls://{self.host}:{self.port}"

    @property
    def leaf_url(self) -> str:
        """URL that the servers of regions below connect to."""
        return f"tls://{self.host}:{self.leaf_port}"

    @property
    def monitor_url(self) -> str:
        """URL of the HTTP monitoring, reachable from the machine itself only."""
        return f"http://{LOOPBACK}:{self.monitor_port}"

    @property
    def listens_on(self) -> str:
        """Address that the server binds: loopback, or all interfaces."""
        return LOOPBACK if self.host == LOOPBACK else "0.0.0.0"  # noqa: S104 - others connect to a server

    @property
    def hosts(self) -> tuple[str, ...]:
        """Hosts that its certificate is for, loopback included."""
        return tuple(dict.fromkeys((self.host, *self.also, "localhost", LOOPBACK)))


@dataclass(frozen=True)
class RegionPlan:
    """One region of a federation; ``parent`` is the region above it, None for the hub."""

    name: ChosenName
    sites: tuple[ChosenName, ...] = ()
    parent: ChosenName | None = None
    bus: LeafAddress = field(default_factory=LeafAddress)


class Plan(Settings):
    """A federation, as far as its keys, servers and settings files need it."""

    run: RunSettings
    regions: tuple[RegionPlan, ...] = Field(min_length=1)
    leaves: bool = True
    bus: ServerAddress = ServerAddress()
    task: TaskSettings = Field(description="the coordinator's")
    site_tasks: Mapping[ChosenName, TaskSettings] = Field({}, description="by site; none: the coordinator's")
    site_policies: Mapping[ChosenName, Policy] = Field(
        {}, description="by site: its first; none: no stricter than the run"
    )
    n_samples: RegisteredSamples = Field({}, description="by site: the most training cases that it counts for")

    @model_validator(mode="after")
    def _adds_up(self) -> "Plan":
        sites = [site for region in self.regions for site in region.sites]
        for kind, names in (("region", [region.name for region in self.regions]), ("site", sites)):
            if doubled := sorted({name for name in names if names.count(name) > 1}):
                raise ValueError(f"{kind} {doubled[0]}: is there twice")
        if HUB in (region.name for region in self.regions):
            raise ValueError(f"region {HUB}: that is the name of the node above all regions; give it another")
        if not self.leaves and any(region.parent for region in self.regions):
            raise ValueError("regions under regions need leaves")
        self.top_down()
        return self

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run.name

    def region(self, name: str) -> RegionPlan:
        """Return the region ``name``."""
        return next(region for region in self.regions if region.name == name)

    def policy_of(self, site: str) -> Policy:
        """Return the first content of a site's ``policy.toml``; after that, the file is the hospital's."""
        run = self.run
        of_run = Policy(encrypted=run.delta.cipher != "none", min_sites=run.aggregation.min_sites)
        return self.site_policies.get(site, of_run)

    def n_samples_at(self, node: str | None) -> dict[ChosenName, int]:
        """Return the known numbers of training cases of the sites and regions that report to ``node`` (None: the hub).

        A region has a number only if all sites in it and below it do.
        """
        sites = () if node is None else self.region(node).sites
        known = {site: self.n_samples[site] for site in sites if site in self.n_samples}
        for child in self.children_of(node):
            below = [site for region in (child, *self.below(child)) for site in self.region(region).sites]
            if below and set(below) <= self.n_samples.keys():
                known[child] = sum(self.n_samples[site] for site in below)
        return known

    def children_of(self, node: str | None) -> tuple[str, ...]:
        """Return the names of the regions directly below the region ``node``, or below the hub (None)."""
        return tuple(region.name for region in self.regions if region.parent == node)

    def below(self, region: str) -> tuple[str, ...]:
        """Return the names of all regions below ``region``, at any depth."""
        children = self.children_of(region)
        return (*children, *(node for child in children for node in self.below(child)))

    def depth(self, region: str) -> int:
        """Count the regions from ``region`` up to the hub, including ``region``."""
        parent = self.region(region).parent
        return 1 if parent is None else 1 + self.depth(parent)

    def top_down(self) -> tuple[RegionPlan, ...]:
        """Return the regions, each after its parent.

        Raises:
            ValueError: a parent is unknown, or the parents form a circle.
        """
        order: list[RegionPlan] = []
        while len(order) < len(self.regions):
            placed = {None, *(region.name for region in order)}
            ready = [region for region in self.regions if region.name not in placed and region.parent in placed]
            if not ready:
                raise ValueError(f"a region's parent is unknown or circular among {[r.name for r in self.regions]}")
            order += ready
        return tuple(order)

    def server(self, node: str) -> Server:
        """Return the server that the services of a region, or of the `HUB`, connect to."""
        if node == HUB or not self.leaves:
            return self._server(HUB, self.bus, 0)
        position = [region.name for region in self.regions].index(node)
        return self._server(node, self.region(node).bus, position + 1)

    def upstream(self, region: str) -> str:
        """Return the URL at which a region's server reaches the one above."""
        placed = self.region(region)
        return placed.bus.upstream or self.server(placed.parent or HUB).leaf_url

    def _server(self, name: str, address: ServerAddress, position: int) -> Server:
        shift = position if address.host == LOOPBACK else 0  # servers on one machine need ports of their own
        below = (region.bus.upstream for region in self.regions if (region.parent or HUB) == name)
        also = (urlsplit(upstream).hostname for upstream in below if upstream is not None)
        return Server(
            name,
            address.host,
            port=address.port or CLIENT_PORT + shift,
            leaf_port=address.leaf_port or LEAF_PORT + shift,
            monitor_port=address.monitor_port or MONITOR_PORT + shift,
            max_store=address.max_store,
            also=tuple(host for host in also if host is not None and host != address.host),
        )

    # --- bus users, by name ---------------------------------------------------------------------------------------

    def users(self) -> tuple[str, ...]:
        """Return the names of all bus users."""
        regions = (name for region in self.regions for name in self.users_of_region(region.name))
        sites = (user_name("site", site) for region in self.regions for site in region.sites)
        return (user_name("coordinator", HUB), user_name("observer", HUB), *regions, *sites)

    def users_of_region(self, region: str) -> tuple[str, ...]:
        """Return the names of a region's bus users; the first is the one that signs."""
        roles = ("aggregator", "uplink", *(("link",) if self.leaves else ()), "observer")
        return tuple(user_name(role, region) for role in roles)


@dataclass(frozen=True)
class Kits:
    """Paths below the folder of kits."""

    root: Path

    @property
    def authority(self) -> Path:
        """The folder of the operator who provisions; nobody else gets it."""
        return self.root / "authority"

    @property
    def coordinator(self) -> Path:
        """The coordinator's kit."""
        return self.root / "coordinator"

    def region(self, region: str) -> Path:
        """Return the kit of a region's operator."""
        return self.root / f"region-{region}"

    def site(self, site: str) -> Path:
        """Return a hospital's kit."""
        return self.root / f"site-{site}"

    def server(self, node: str) -> Path:
        """Return the kit with the server of a region, or of the `HUB`."""
        return self.root / "hub" if node == HUB else self.region(node)

    def seed_file(self, user: str) -> Path:
        """Return the seed file of a bus user; a link's has the form of a server setting, as the server reads it."""
        role, _, node = user.partition(".")
        if role == "coordinator":
            return self.coordinator / f"{user}.nk"
        if role == "site":
            return self.site(node) / f"{user}.nk"
        return self.server(node) / ("link.conf" if role == "link" else f"{user}.nk")
