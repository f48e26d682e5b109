"""What makes a hospital count by its cases, however seldom it contributes.

A model trained on whatever arrives is trained for whoever is quick: a hospital ten times slower than the others adds a
tenth of what it would add in synchronous rounds. Fraboni et al. 2022, "A General Theory for Federated Optimization with
Asynchronous and Heterogeneous Clients Updates" (arXiv:2206.10189), give the condition for the same optimum as that of
synchronous averaging: per flush, every source must *on average* add weight in proportion to its cases, staleness weights
included. So each contribution is multiplied by the flushes between the contributions of its source, estimated online as
in Wang and Ji 2024, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging" (FedAU,
arXiv:2306.03401), and its staleness factor is taken relative to what is usual for its source.

A flush of quick sources then has less mass than one that a seldom source is in; to divide each by its own mass would
take the correction out again. So the model's step is the longer the more mass a flush has (`Weighed.scale`), and to stay
stable (a seldom source's update would be applied several times over) the longest of late is `LONGEST_STEP`: the quick are
held back.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

LIMIT = 10.0
"""A source counts as at most so many times as seldom, or as frequent, as the mean source: one update must not decide."""

DECAY = 0.95
"""How fast a source's past is forgotten, per flush that it is in: half of it after 14."""

LONGEST_STEP = 1.5
"""The model's longest step of late, in steps of a usual flush; a flush of more mass shortens all others instead."""

SILENT = 20.0
"""A source that is there and contributes nothing for so many intervals of the mean source holds nobody back any longer."""

PEAK_DECAY = 0.999
"""How fast the largest mass of late is forgotten, per flush: half of it after 700, longer than the slowest stays away."""


NO_LIMITS: Mapping[str, float] = {}


@dataclass(frozen=True, slots=True)
class Offer:
    """One contribution as it enters a flush."""

    source: str
    mass: float
    """Number of samples, or what a region computed."""
    freshness: float
    """Its staleness factor."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """A flush with staleness and participation in it."""

    masses: tuple[float, ...]
    """In the order of the offers."""
    scale: float
    """The length of the model's step: their sum over a usual flush's, and over what keeps the longest of late bounded."""


@dataclass(frozen=True, slots=True)
class _Record:
    """Discounted sums over the flushes that one source was in."""

    since: int
    """Number of the flush it was last in, or at which it first appeared; flushes while it was away are left out."""
    away: int | None = None
    """Number of the flush after which it went away."""
    flushes: float = 0.0
    contributions: float = 0.0
    freshness: float = 0.0
    mass: float = 0.0

    def back(self, flush: int) -> "_Record":
        """Return it as it goes on after ``flush``."""
        return self if self.away is None else replace(self, since=self.since + flush - self.away, away=None)

    def then(self, flush: int, offers: Sequence[Offer]) -> "_Record":
        """Return it with the flush of that number, which it is in."""
        passed = max(1, flush - self.back(flush).since)
        return _Record(
            since=flush,
            away=None if self.away is None else flush,
            flushes=DECAY * self.flushes + passed,
            contributions=DECAY * self.contributions + len(offers),
            freshness=DECAY * self.freshness + sum(offer.freshness for offer in offers),
            mass=DECAY * self.mass + sum(offer.mass for offer in offers),
        )

    @property
    def interval(self) -> float:
        """Flushes per contribution."""
        return self.flushes / self.contributions

    @property
    def usual_freshness(self) -> float:
        """Mean staleness factor of its contributions."""
        return self.freshness / self.contributions

    @property
    def usual_mass(self) -> float:
        """Mean mass of its contributions."""
        return self.mass / self.contributions


class Participation:
    """Counts, per source, how often it contributes, how fresh and how much."""

    def __init__(self) -> None:
        self._flush = 0
        self._records: dict[str, _Record] = {}
        self._expected: frozenset[str] = frozenset()
        self._peak = 1.0
        self._left_out: frozenset[str] = frozenset()

    def expect(self, sources: Iterable[str]) -> None:
        """Count from now on for ``sources``: the time that one is away does not make it a slow one."""
        expected = frozenset(sources)
        for source in expected - self._expected:
            self._records[source] = self._records.get(source, _Record(since=self._flush)).back(self._flush)
        for source in self._expected - expected:
            self._records[source] = replace(self._records[source], away=self._flush)
        self._expected = expected

    def weigh(self, offers: Sequence[Offer], limits: Mapping[str, float] = NO_LIMITS) -> Weighed:
        """Return the masses and the scale of the next flush. It counts only once it is recorded.

        ``limits`` are what sources are believed at most (`Claims.limits`), whatever they were believed before.
        """
        masses, relative = self._masses(offers, limits)
        return Weighed(masses, relative / max(1.0, self._peak / LONGEST_STEP, relative / LONGEST_STEP))

    def leave_out(self, sources: Iterable[str]) -> None:
        """Wait no longer for ``sources``, whose newest contributions were refused: they shorten nobody's step."""
        self._left_out |= frozenset(sources)

    def record(self, offers: Sequence[Offer], limits: Mapping[str, float] = NO_LIMITS) -> None:
        """Count a flush; ``limits`` as when it was weighed."""
        _, relative = self._masses(offers, limits)
        self._peak = max(1.0, PEAK_DECAY * self._peak, relative)
        self._records |= self._next(offers)
        self._left_out -= {offer.source for offer in offers}
        self._flush += 1

    def _masses(self, offers: Sequence[Offer], limits: Mapping[str, float]) -> tuple[tuple[float, ...], float]:
        """Return the masses, and their sum over what one contribution of every source weighs: 1 on average."""
        records = self._records | self._next(offers)
        counted = self._expected | {offer.source for offer in offers}
        known = {source: record for source, record in records.items() if source in counted and record.contributions}
        mean = len(known) / sum(1.0 / record.interval for record in known.values())
        masses = []
        for offer in offers:
            record = known[offer.source]
            freshness = min(1.0, offer.freshness / record.usual_freshness)
            masses.append(offer.mass * freshness * min(max(record.interval, mean / LIMIT), mean * LIMIT))
        contributing = {offer.source for offer in offers}
        usual = (
            min(record.usual_mass, limits.get(source, math.inf))
            for source, record in known.items()
            if source in contributing or (source not in self._left_out and self._is_heard(record, mean))
        )
        return tuple(masses), sum(masses) / sum(usual)

    def _is_heard(self, record: _Record, mean_interval: float) -> bool:
        return self._flush + 1 - record.back(self._flush).since <= SILENT * mean_interval

    def _next(self, offers: Sequence[Offer]) -> dict[str, _Record]:
        by_source: dict[str, list[Offer]] = {}
        for offer in offers:
            by_source.setdefault(offer.source, []).append(offer)
        flush = self._flush + 1
        return {
            source: self._records.get(source, _Record(since=self._flush)).then(flush, own)
            for source, own in by_source.items()
        }
