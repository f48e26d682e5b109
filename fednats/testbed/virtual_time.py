"""A federation in virtual time: the daemons' state machines, sums and optimiser over an event queue, in one process.

A day of training takes no longer here than its arithmetic, and the same seed gives the same run to the last bit. Use it
for questions about the algorithm (how does a hospital ten times slower than the others fare?), not about the bus.
Deltas are quantised and added as in a run with ``cipher = "none"``. It makes no evaluations; the caller does.
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
    """One site: its region, its learner and its delays."""

    region: str
    learner: Learner
    train_s: float
    delay_s: float = 0.0
    """Delay between the site and its region, one way."""
    registered: int | None = None
    """Registered number of training cases; None if not registered."""


class VirtualFederation:
    """Sites, their regions and a coordinator, with links of ``delay_s`` one way between regions and coordinator.

    ``parameters`` and ``weights``, float32[n_parameters], are the model at version 0.

    Raises:
        ValueError: the settings have a cipher other than ``none``.
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
        """Train until ``until_s``, or until a stop rule holds; return the newest weights, float32[n_parameters]."""
        self._coordinator.start()
        self._world.clock.run(until_s)
        return self.versions[-1].weights

    @property
    def versions(self) -> Sequence[PublishedVersion]:
        """All published versions."""
        return self._coordinator.versions

    @property
    def refused(self) -> Sequence[Refuse]:
        """All refusals."""
        return self._world.refused

    @property
    def norms(self) -> Mapping[str, float]:
        """L2 norm of every sum that reached the coordinator, by id."""
        return self._coordinator.norms

    def counted(self) -> Counter[str]:
        """Return how often the model contains each update."""
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
