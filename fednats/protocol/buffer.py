"""The buffer that every tier aggregates with: a region over its sites, a region over regions, the coordinator.

Buffered asynchronous aggregation after Nguyen et al. 2022, "Federated Learning with Buffered Asynchronous
Aggregation" (FedBuff, arXiv:2106.06639), with weights by samples, staleness and participation. Synchronous FedAvg
(McMahan et al. 2017, arXiv:1602.05629) is the goal ``all``.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Literal

from fednats.config import AggregationSettings
from fednats.messages import Aggregate, Update
from fednats.protocol import staleness
from fednats.protocol.admission import Roster
from fednats.protocol.claims import Claim, Claims
from fednats.protocol.group import Group, distinct_sites
from fednats.protocol.participation import Offer, Participation, Weighed

Goal = int | Literal["all"]


@dataclass(frozen=True, slots=True)
class Contribution:
    """The buffer's record of one update or aggregate."""

    contribution_id: str
    source: str
    """The site or region that sent it."""
    n_sites: int
    version: int
    """The model version its staleness is counted from."""
    grid_id: str
    mass: float
    """As claimed: number of samples, or the mass that a region computed. `Claims` decides how much of it counts."""
    total_weight: int = 1
    """Sum of the integer weights already in it."""
    key_id: str = ""
    """Key that it is encrypted for."""
    min_sites: int = 1
    """Fewest distinct sites that a sum containing it may have."""
    of_region: bool = False

    @property
    def claim(self) -> Claim:
        """The mass that it claims."""
        return Claim(self.source, self.mass, self.of_region)


def contribution_of(head: Update | Aggregate) -> Contribution:
    """Return the buffer's record of ``head``."""
    if isinstance(head, Update):
        return Contribution(
            head.update_id,
            head.site,
            1,
            head.base_version,
            head.grid_id,
            float(head.n_samples),
            key_id=head.key_id,
            min_sites=head.min_sites,
        )
    return Contribution(
        head.aggregate_id,
        head.region,
        head.n_sites,
        head.model_version,
        head.grid_id,
        head.mass,
        head.total_weight,
        head.key_id,
        head.min_sites,
        of_region=True,
    )


@dataclass(frozen=True, slots=True)
class Flush:
    """Contributions to be summed together, ordered by id, with their masses after staleness and participation."""

    contributions: tuple[Contribution, ...]
    version: int
    """Model version at which it was weighed."""
    masses: tuple[float, ...]
    scale: float
    """Length of the model's step: this flush's mass over a usual one. 1 without the participation correction."""
    n_sites: int
    believed: tuple[float, ...] = ()
    """How much of each contribution's claimed mass counts, before staleness and participation factors."""


@dataclass(frozen=True, slots=True)
class Terms:
    """The settings and circumstances that a buffer decides by."""

    settings: AggregationSettings
    goal: Goal
    roster: Roster
    """Who may contribute; the goal ``all`` waits for everybody here."""
    present: frozenset[str]
    """The sources that are present. A goal of *n* contributions is lowered to their number."""
    capacity: int | None
    """Largest total weight of one flush (what the fields of an encrypted sum hold); None for no bound."""


class Buffer:
    """Collect contributions; give them out at the goal, or at a deadline if there are enough distinct sites.

    Contributions on different grids are never given out together, because their integers mean different steps; nor are
    those for different keys, because their ciphertexts cannot be added.
    """

    def __init__(self, terms: Terms) -> None:
        self._claims = Claims()
        self._participation = Participation()
        self._contributions: dict[str, Contribution] = {}
        self._groups: dict[tuple[str, str], Group] = {}
        """By grid and key."""
        self.configure(terms)

    def configure(self, terms: Terms) -> None:
        """Continue under other terms; the buffered contributions stay."""
        self._terms = terms
        self._settings = terms.settings
        self._claims.expect(terms.roster.sources, terms.roster.n_samples)
        self._participation.expect(terms.present)

    def __len__(self) -> int:
        return len(self._contributions)

    def clear(self) -> None:
        """Drop the contributions; what is known of their sources stays."""
        self._contributions.clear()
        self._groups.clear()

    def __contains__(self, contribution_id: str) -> bool:
        return contribution_id in self._contributions

    def add(self, contribution: Contribution) -> None:
        """Take ``contribution`` in; adding the same id again changes nothing."""
        if contribution.contribution_id not in self._contributions:
            self._contributions[contribution.contribution_id] = contribution
            self._groups.setdefault(_kind(contribution), Group()).add(contribution)

    def expire(self, version: int) -> tuple[Contribution, ...]:
        """Remove and return the contributions past the staleness cut-off at model ``version``."""
        expired = tuple(
            contribution
            for contribution in self._contributions.values()
            if staleness.too_stale(version - contribution.version, self._settings.staleness)
        )
        for contribution in expired:
            self._remove(contribution)
        return expired

    def take(self, version: int, *, deadline: bool = False, without: AbstractSet[str] = frozenset()) -> Flush | None:
        """Remove and weigh the contributions that are ready at model ``version``, or return None.

        A ``deadline`` waives the goal, but neither ``min_sites`` nor what a contribution asks for. Contributions from
        the sources in ``without`` stay in the buffer, and nobody waits for those sources.
        """
        groups = self._groups.values() if not without else [_part(group, without) for group in self._groups.values()]
        ready = [
            content
            for group in groups
            if self._may_be_ready(group, without, deadline=deadline)
            and distinct_sites(content := group.content()) >= self._settings.min_sites
            and (deadline or self._reached(group, content, without))
        ]
        if not ready:
            return None
        selected = _all_of(self._within_capacity(max(ready, key=len))).content()
        if distinct_sites(selected) < self._settings.min_sites:
            return None
        for contribution in selected:
            self._remove(contribution)
        return self.weigh(selected, version)

    def made(self, contributions: Sequence[Contribution], version: int, left_out: Collection[str]) -> None:
        """Record who was in a flush weighed at ``version``, now that it is combined for good.

        Contributions in ``left_out``, by id, were refused. They affect neither a source's believed mass nor its
        frequency.
        """
        counted = [contribution for contribution in contributions if contribution.contribution_id not in left_out]
        self._participation.leave_out(
            contribution.source for contribution in contributions if contribution.contribution_id in left_out
        )
        if counted:
            claims = [contribution.claim for contribution in counted]
            offers = self._offers(counted, self._claims.believe(claims), version)
            self._participation.record(offers, self._claims.limits(claims))
            self._claims.record(claims)

    def weigh(self, selected: Iterable[Contribution], version: int) -> Flush:
        """Return the flush of ``selected`` at model ``version``; changes nothing."""
        selected = sorted(selected, key=lambda contribution: contribution.contribution_id)
        claims = [contribution.claim for contribution in selected]
        believed = self._claims.believe(claims)
        offers = self._offers(selected, believed, version)
        if self._settings.participation_correction and offers:
            weighed = self._participation.weigh(offers, self._claims.limits(claims))
        else:
            weighed = Weighed(tuple(offer.mass * offer.freshness for offer in offers), scale=1.0)
        return Flush(tuple(selected), version, weighed.masses, weighed.scale, distinct_sites(selected), believed)

    def _remove(self, contribution: Contribution) -> None:
        del self._contributions[contribution.contribution_id]
        kind = _kind(contribution)
        self._groups[kind].remove(contribution)
        if not self._groups[kind]:
            del self._groups[kind]

    def _may_be_ready(self, group: Group, without: AbstractSet[str], *, deadline: bool) -> bool:
        """Whether ``group`` is worth a full look. Every arrival asks, so this must not slow down as it grows."""
        if group.n_sites < self._settings.min_sites:
            return False
        if deadline or not group.fits_together:
            return True
        return self._terms.goal == "all" or len(group) >= min(self._terms.goal, self._n_present(without))

    def _n_present(self, without: AbstractSet[str]) -> int:
        return len(self._terms.present - without) if without else len(self._terms.present)

    def _reached(self, group: Group, content: list[Contribution], without: AbstractSet[str]) -> bool:
        """Whether ``content`` reaches the goal. Sources asking for more sites than ``group`` has are not awaited."""
        if self._terms.goal == "all":
            return self._terms.roster.sources <= group.sources
        waiting = without | (group.sources - {contribution.source for contribution in content})
        return len(content) >= min(self._terms.goal, self._n_present(waiting))

    def _within_capacity(self, group: list[Contribution]) -> list[Contribution]:
        """Keep as much as fits, taking every source's first contribution before any source's second."""
        seen: Counter[str] = Counter()
        ranked = []
        for position, contribution in enumerate(group):
            ranked.append((seen[contribution.source], position, contribution))
            seen[contribution.source] += 1
        selected = []
        total = 0
        for _, _, contribution in sorted(ranked, key=lambda entry: entry[:2]):
            if self._terms.capacity is None or total + contribution.total_weight <= self._terms.capacity:
                selected.append(contribution)
                total += contribution.total_weight
        return selected

    def _offers(self, contributions: Sequence[Contribution], believed: Sequence[float], version: int) -> list[Offer]:
        return [
            Offer(
                contribution.source,
                mass,
                staleness.factor(version - contribution.version, self._settings.staleness),
            )
            for contribution, mass in zip(contributions, believed, strict=True)
        ]


def _kind(contribution: Contribution) -> tuple[str, str]:
    """Return grid and key: only contributions with the same grid and key can be added."""
    return contribution.grid_id, contribution.key_id


def _part(group: Group, without: AbstractSet[str]) -> Group:
    return _all_of(contribution for contribution in group if contribution.source not in without)


def _all_of(contributions: Iterable[Contribution]) -> Group:
    group = Group()
    for contribution in contributions:
        group.add(contribution)
    return group
