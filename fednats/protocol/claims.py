"""How much of what a source claims is believed: nothing proves a number of cases, and encryption hides the rest.

A claim counts up to a bound that one liar cannot move. The bound is the lower of two, and both follow from what the node has
seen itself:

- The source's own past. Its claim may double from one flush to the next, so a hospital that imports an archive is followed
  within a few flushes, and one wild figure changes little.
- The others on the roster. A site counts at most ``claim_limit`` times the median of the other sites, a region at most
  `REGION_FACTOR` times as much of the other regions. Nobody is among its own others, and one of several does not move a
  median far.

Cutting off the sizes that clients claim before they weigh anything follows Portnoy, Tirosh and Hendler 2020, "Towards
Federated Learning With Byzantine-Robust Client Weighting" (arXiv:2004.04986).
"""

import bisect
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

GROWTH = 2.0
"""A source is believed at most this many times the largest of its last `REMEMBERED` claims, as they were believed."""

REMEMBERED = 16

REGION_FACTOR = 3.0
"""Regions differ more than sites: by the number of their sites, and by who is in a sum."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The mass that one contribution says it has."""

    source: str
    mass: float
    """Number of samples, or what a region computed."""
    of_region: bool = False
    """Regions are compared with regions, sites with sites."""


@dataclass(slots=True)
class _Source:
    """What one source was believed of late."""

    of_region: bool
    past: tuple[float, ...]
    """The newest last."""
    alone: bool
    """Whether there has been nobody to compare it with."""

    @property
    def usual(self) -> float:
        return statistics.median(self.past)


class Claims:
    """What each source of one node was believed of late.

    >>> claims = Claims()
    >>> claims.expect({"a", "b", "liar"}, 3.0)
    >>> claims.believe([Claim("a", 300.0), Claim("b", 200.0), Claim("liar", 1e12)])
    (300.0, 200.0, 900.0)
    >>> claims.record([Claim("a", 300.0)])
    >>> claims.believe([Claim("a", 4000.0)])
    (600.0,)
    """

    def __init__(self) -> None:
        self._roster: Collection[str] = frozenset()
        self._limit = math.inf
        self._known: dict[str, _Source] = {}

    def expect(self, roster: Collection[str], claim_limit: float) -> None:
        """Compare from now on with those on ``roster``."""
        self._roster, self._limit = roster, claim_limit

    def believe(self, claims: Sequence[Claim]) -> tuple[float, ...]:
        """Return how much of each claim of one flush counts. It is remembered only once it is recorded."""
        limits = self.limits(claims)
        return tuple(min(claim.mass, limits[claim.source], self._grown(claim.source)) for claim in claims)

    def record(self, claims: Sequence[Claim]) -> None:
        """Count the claims of a flush."""
        limits = self.limits(claims)
        believed = self.believe(claims)
        for source, known in self._known.items():
            if known.alone and limits[source] < math.inf:  # now there is somebody
                known.past, known.alone = tuple(min(mass, limits[source]) for mass in known.past), False
        for claim, mass in zip(claims, believed, strict=True):
            alone = limits[claim.source] == math.inf
            known = self._known.setdefault(claim.source, _Source(claim.of_region, (), alone))
            known.past = (*known.past, mass)[-REMEMBERED:]

    def limits(self, claims: Sequence[Claim] = ()) -> dict[str, float]:
        """Return what each source that is known, or in ``claims``, may grow to; infinity where there are no others.

        What was believed beside others stays believed: a neighbour that claims little takes nothing from anybody.
        """
        usual = self._usual(claims)
        limits: dict[str, float] = {}
        for of_region, limit in ((False, self._limit), (True, REGION_FACTOR * self._limit)):
            others = _Others({source: mass for source, mass in usual[of_region].items() if source in self._roster})
            limits |= {source: limit * others.median(source) for source in usual[of_region]}
        for source, known in self._known.items():
            if not known.alone:
                limits[source] = max(limits[source], known.usual)
        return limits

    def _usual(self, claims: Sequence[Claim]) -> dict[bool, dict[str, float]]:
        """Return the usual mass of each site, and of each region; of one that is new what it claims."""
        usual: dict[bool, dict[str, float]] = {False: {}, True: {}}
        for source, known in self._known.items():
            usual[known.of_region][source] = known.usual
        new: dict[tuple[bool, str], list[float]] = {}
        for claim in claims:
            if claim.source not in self._known:
                new.setdefault((claim.of_region, claim.source), []).append(claim.mass)
        for (of_region, source), masses in new.items():
            usual[of_region][source] = statistics.median(masses)
        return usual

    def _grown(self, source: str) -> float:
        known = self._known.get(source)
        return math.inf if known is None else GROWTH * max(known.past)


class _Others:
    """Answers with the median of all but one.

    >>> _Others({"a": 1.0, "b": 2.0, "c": 3.0, "d": 9.0}).median("d"), _Others({"a": 1.0}).median("a")
    (2.0, inf)
    """

    def __init__(self, masses: Mapping[str, float]) -> None:
        self._masses = masses
        self._ordered = sorted(masses.values())

    def median(self, source: str) -> float:
        """Return the median of the others than ``source``; of two in the middle the upper, which a single low one is not."""
        n = len(self._ordered) - (source in self._masses)
        if not n:
            return math.inf
        place = bisect.bisect_left(self._ordered, self._masses[source]) if source in self._masses else n
        return self._ordered[n // 2 + (n // 2 >= place)]
