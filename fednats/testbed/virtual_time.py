"""A federation in virtual time: the machines, sums and optimiser of the daemons over a queue of events, no processes.

What takes a site a day takes no time here, and the same seed gives the same run to the last bit: for questions about the
algorithm (what becomes of a hospital ten times slower than the others?), not about the bus. Deltas are quantised and
added as in a run with ``cipher = "none"``; evaluations are left to who asks.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from fednats.codec.layout import Layout
from fednats.config import RunSettings
from fednats.messages import ParameterSpec, Update
from fednats.protocol.events import Event, Refuse
from fednats.testbed.virtual_nodes import CoordinatorNode, Learner, RegionNode, SiteNode
from fednats.testbed.virtual_world import PublishedVersion, Weights, World


@dataclass(frozen=True)
class VirtualSite:
    """One site: where it reports, what it learns with, and how long things take it."""

    region: str
    learner: Learner
    train_s: float
    delay_s: float = 0.0
    """One way between the site and its region."""
    registered: int | None = None
    """Training cases that it was registered with."""


class VirtualFederation:
    """Sites, their regions and a coordinator; the regions report to it over links of ``delay_s`` one way.

    ``parameters`` and ``weights``, float32[n_parameters], are the model at version 0.
    """

    def __init__(
        self,
        settings: RunSettings,
        sites: Mapping[str, VirtualSite],
        parameters: Sequence[ParameterSpec],
        weights: Weights,
        delay_s: float = 0.0,
    ) -> None:
        if settings.delta.cipher != "none":
            raise ValueError(f'cipher is {settings.delta.cipher!r}; virtual time adds plain integers: set it to "none"')
        self._world = World(settings, Layout(parameters))
        self._settings = sites
        self._delay_s = delay_s
        regions = sorted({site.region for site in sites.values()})
        self._coordinator = CoordinatorNode(self._world, regions, weights, self._spread)
        self._regions = {
            region: RegionNode(
                self._world,
                region,
                frozenset(name for name, site in sites.items() if site.region == region),
                {name: site.registered for name, site in sites.items() if site.registered is not None},
                partial(self._carry, self._coordinator, delay_s),
            )
            for region in regions
        }
        self._sites = {
            name: SiteNode(
                self._world,
                name,
                site.region,
                site.learner,
                site.train_s,
                partial(self._carry, self._regions[site.region], site.delay_s),
            )
            for name, site in sites.items()
        }

    def run(self, until_s: float) -> Weights:
        """Learn until ``until_s``, or until a stop rule holds; return the newest weights."""
        self._coordinator.start()
        self._world.clock.run(until_s)
        return self.versions[-1].weights

    @property
    def versions(self) -> Sequence[PublishedVersion]:
        """All versions that were published."""
        return self._coordinator.versions

    @property
    def refused(self) -> Sequence[Refuse]:
        """Everything that was refused."""
        return self._world.refused

    @property
    def norms(self) -> Mapping[str, float]:
        """L2 norm of every sum that came to the coordinator, by id."""
        return self._coordinator.norms

    def counted(self) -> Counter[str]:
        """Return how often each update is in the model."""
        sums = {made.combination_id: made for region in self._regions.values() for made in region.combined}
        applied = (
            sums[part.head.aggregate_id]
            for made in self._coordinator.combined
            for part in made.parts
            if not isinstance(part.head, Update)
        )
        return Counter(part.head.update_id for made in applied for part in made.parts if isinstance(part.head, Update))

    def _spread(self, version: PublishedVersion) -> None:
        clock = self._world.clock
        for region in self._regions.values():
            clock.after(self._delay_s, partial(region.see, version))
        for name, site in self._sites.items():
            clock.after(self._delay_s + self._settings[name].delay_s, partial(site.see, version))

    def _carry(self, node: RegionNode | CoordinatorNode, delay_s: float, event: Event) -> None:
        self._world.clock.after(delay_s, partial(node.feed, event))
