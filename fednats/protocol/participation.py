"""Weights that let a hospital count by its cases, however seldom it contributes.

Training on whatever arrives favours fast hospitals: one that is ten times slower adds a tenth of what it would add in
synchronous rounds. Fraboni et al. 2022, "A General Theory for Federated Optimization with Asynchronous and
Heterogeneous Clients Updates" (arXiv:2206.10189), give the condition for the optimum of synchronous averaging: per
flush, every source must *on average* add weight in proportion to its cases, staleness weights included. So each
contribution is multiplied by the number of flushes between its source's contributions. That number is estimated online
as in Wang and Ji 2024, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging"
(FedAU, arXiv:2306.03401). The staleness factor is taken relative to the source's usual one.

A flush of fast sources then has less mass than one with a slow source in it; dividing each by its own mass would undo
the correction. The model's step is therefore proportional to the mass of the flush (`Weighed.scale`). A slow source's
update would then count several times over, which is unstable, so the longest recent step is limited to `LONGEST_STEP`
and all others shrink in proportion.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

LIMIT = 10.0
"""A source's interval is bounded to the mean source's, times or divided by this, so that no single update decides."""

DECAY = 0.95
"""Decay of a source's history per flush that it is in: half of it is forgotten after 14."""

LONGEST_STEP = 1.5
"""The longest recent step, in usual steps. A flush of more mass shortens all other steps instead."""

SILENT = 20.0
"""A present source that is silent for this many intervals of the mean source no longer shortens the others' steps."""

PEAK_DECAY = 0.999
"""Decay of the largest recent mass per flush: half after 700, longer than the slowest source's interval."""


NO_LIMITS: Mapping[str, float] = {}


@dataclass(frozen=True, slots=True)
class Offer:
    """One contribution offered to a flush."""

    source: str
    mass: float
    """Number of samples, or the mass that a region computed."""
    freshness: float
    """Its staleness factor."""


@dataclass(frozen=True, slots=True)
class Weighed:
    """A flush after staleness and participation factors."""

    masses: tuple[float, ...]
    """In the order of the offers."""
    scale: float
    """Length of the model's step: the flush's mass over a usual flush's, scaled so that recent steps stay bounded."""


@dataclass(frozen=True, slots=True)
class _Record:
    """Discounted sums over the flushes that one source was in."""

    since: int
    """Flush that the source was last in or first appeared at, moved forward by the flushes it was away for."""
    away: int | None = None
    """Flush after which the source went away; None while it is present."""
    flushes: float = 0.0
    contributions: float = 0.0
    freshness: float = 0.0
    mass: float = 0.0

    def back(self, flush: int) -> "_Record":
        """Return the record of a source that is present again at ``flush``; the time away does not count."""
        return self if self.away is None else replace(self, since=self.since + flush - self.away, away=None)

    def then(self, flush: int, offers: Sequence[Offer]) -> "_Record":
        """Return the record with ``offers`` to this flush added."""
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
        """Mean flushes per contribution."""
        return self.flushes / self.contributions

    @property
    def usual_freshness(self) -> float:
        """Mean staleness factor of the source's contributions."""
        return self.freshness / self.contributions

    @property
    def usual_mass(self) -> float:
        """Mean mass of the source's contributions."""
        return self.mass / self.contributions


class Participation:
    """Tracks how often, how fresh and how large each source's contributions are."""

    def __init__(self) -> None:
        self._flush = 0
        self._records: dict[str, _Record] = {}
        self._expected: frozenset[str] = frozenset()
        self._peak = 1.0
        self._left_out: frozenset[str] = frozenset()

    def expect(self, sources: Iterable[str]) -> None:
        """Count for ``sources`` from now on. The time that a source is away does not make it a slow one."""
        expected = frozenset(sources)
        for source in expected - self._expected:
            self._records[source] = self._records.get(source, _Record(since=self._flush)).back(self._flush)
        for source in self._expected - expected:
            self._records[source] = replace(self._records[source], away=self._flush)
        self._expected = expected

    def weigh(self, offers: Sequence[Offer], limits: Mapping[str, float] = NO_LIMITS) -> Weighed:
        """Return the masses and the scale of the next flush. Nothing is remembered until `record`.

        ``limits`` cap the usual mass of each source (`Claims.limits`), whatever it was believed earlier.
        """
        masses, relative = self._masses(offers, limits)
        return Weighed(masses, relative / max(1.0, self._peak / LONGEST_STEP, relative / LONGEST_STEP))

    def leave_out(self, sources: Iterable[str]) -> None:
        """Stop waiting for ``sources``, whose newest contributions were refused, so that they shorten no steps."""
        self._left_out |= frozenset(sources)

    def record(self, offers: Sequence[Offer], limits: Mapping[str, float] = NO_LIMITS) -> None:
        """Record a flush; ``limits`` as in `weigh`."""
        _, relative = self._masses(offers, limits)
        self._peak = max(1.0, PEAK_DECAY * self._peak, relative)
        self._records |= self._next(offers)
        self._left_out -= {offer.source for offer in offers}
        self._flush += 1

    def _masses(self, offers: Sequence[Offer], limits: Mapping[str, float]) -> tuple[tuple[float, ...], float]:
        """Return the masses, and their sum relative to one usual contribution of every active source (1 on average)."""
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
