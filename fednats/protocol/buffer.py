"""The buffer that every tier aggregates with: a region over its sites, a region over regions, the coordinator.

Buffered asynchronous aggregation after Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous
Aggregation" (FedBuff, arXiv:2106.06639), with weights by samples, staleness and participation. Synchronous FedAvg
(McMahan et al. 2017, arXiv:1602.05629) is the goal ``all``.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fednats.config import AggregationSettings
from fednats.protocol import staleness

PARTICIPATION_DECAY = 0.95
"""How fast past contributions are forgotten, per flush: half of them after 14 flushes."""

PARTICIPATION_LIMIT = 10.0
"""Largest factor, up or down, of the participation correction."""

Goal = int | Literal["all"]


@dataclass(frozen=True, slots=True)
class Contribution:
    """What the buffer knows of one update or aggregate."""

    contribution_id: str
    source: str
    """The site or region it comes from."""
    n_sites: int
    version: int
    """The model version its staleness is counted from."""
    grid_id: str
    mass: float
    """Number of samples, or for an aggregate the mass that the region computed."""
    total_weight: int = 1
    """Sum of the integer weights already in it."""


@dataclass(frozen=True, slots=True)
class Flush:
    """Contributions that are summed together, ordered by id, and the mass of each after staleness and participation."""

    contributions: tuple[Contribution, ...]
    masses: tuple[float, ...]
    n_sites: int


class Buffer:
    """Collect contributions; give them out when the goal, or at a deadline the minimum of distinct sites, is reached.

    ``sources`` is who is expected; ``capacity`` bounds the total weight of one flush (what the fields of an encrypted
    sum hold), None for no bound. Contributions on different grids are never given out together: their integers mean
    different steps.
    """

    def __init__(
        self, settings: AggregationSettings, goal: Goal, sources: Iterable[str], capacity: int | None = None
    ) -> None:
        self.configure(settings, goal, sources, capacity)
        self._contributions: dict[str, Contribution] = {}
        self._participation: dict[str, float] = {}

    def configure(
        self, settings: AggregationSettings, goal: Goal, sources: Iterable[str], capacity: int | None
    ) -> None:
        """Go on with other settings; what is here stays."""
        self.settings = settings
        self._goal = goal
        self._sources = frozenset(sources)
        self._capacity = capacity

    def __len__(self) -> int:
        return len(self._contributions)

    def __contains__(self, contribution_id: str) -> bool:
        return contribution_id in self._contributions

    def add(self, contribution: Contribution) -> None:
        """Take ``contribution`` in; the same id again changes nothing."""
        self._contributions.setdefault(contribution.contribution_id, contribution)

    def expire(self, version: int) -> tuple[Contribution, ...]:
        """Take out and return what is past the staleness cut-off at model ``version``."""
        expired = tuple(
            contribution
            for contribution in self._contributions.values()
            if staleness.too_stale(version - contribution.version, self.settings.staleness)
        )
        for contribution in expired:
            del self._contributions[contribution.contribution_id]
        return expired

    def take(self, version: int, *, deadline: bool = False) -> Flush | None:
        """Take out and weigh what is ready at model ``version``, or return None.

        At a ``deadline`` the goal is waived, never the minimum of distinct sites.
        """
        ready = [
            group
            for group in self._groups()
            if _distinct_sites(group) >= self.settings.min_sites and (deadline or self._reached(group))
        ]
        if not ready:
            return None
        selected = self._within_capacity(max(ready, key=len))
        if _distinct_sites(selected) < self.settings.min_sites:
            return None
        for contribution in selected:
            del self._contributions[contribution.contribution_id]
        selected.sort(key=lambda contribution: contribution.contribution_id)
        self._count(selected)
        return Flush(
            contributions=tuple(selected),
            masses=tuple(self._mass(contribution, version) for contribution in selected),
            n_sites=_distinct_sites(selected),
        )

    def _groups(self) -> list[list[Contribution]]:
        groups: dict[str, list[Contribution]] = {}
        for contribution in self._contributions.values():
            groups.setdefault(contribution.grid_id, []).append(contribution)
        return list(groups.values())

    def _reached(self, group: list[Contribution]) -> bool:
        if self._goal == "all":
            return self._sources <= {contribution.source for contribution in group}
        return len(group) >= min(self._goal, len(self._sources))

    def _within_capacity(self, group: list[Contribution]) -> list[Contribution]:
        """Keep what fits, every source's first contribution before any source's second."""
        seen: Counter[str] = Counter()
        ranked = []
        for position, contribution in enumerate(group):
            ranked.append((seen[contribution.source], position, contribution))
            seen[contribution.source] += 1
        selected = []
        total = 0
        for _, _, contribution in sorted(ranked, key=lambda entry: entry[:2]):
            if self._capacity is None or total + contribution.total_weight <= self._capacity:
                selected.append(contribution)
                total += contribution.total_weight
        return selected

    def _count(self, selected: list[Contribution]) -> None:
        for source in self._participation:
            self._participation[source] *= PARTICIPATION_DECAY
        for contribution in selected:
            self._participation[contribution.source] = self._participation.get(contribution.source, 0.0) + 1.0

    def _mass(self, contribution: Contribution, version: int) -> float:
        mass = contribution.mass * staleness.factor(version - contribution.version, self.settings.staleness)
        if self.settings.participation_correction:
            mean = sum(self._participation.values()) / len(self._participation)
            correction = mean / self._participation[contribution.source]
            mass *= min(PARTICIPATION_LIMIT, max(1 / PARTICIPATION_LIMIT, correction))
        return mass


def _distinct_sites(group: list[Contribution]) -> int:
    """Count the sites that are surely distinct: regions share none, one region's aggregates may share all."""
    largest: dict[str, int] = {}
    for contribution in group:
        largest[contribution.source] = max(largest.get(contribution.source, 0), contribution.n_sites)
    return sum(largest.values())
