"""How much of a source's claimed mass counts. No proof of a case count exists, and encryption hides everything else.

A claim counts up to a bound that one liar cannot move. The bound is the lower of two:

- The source's own past. Its claim may double from one flush to the next, so a hospital that imports an archive is
  followed within a few flushes, while one absurd figure changes little.
- The number of training cases registered at provisioning. Without a registration, the other sources on the roster are
  the measure: a site counts at most `SITE_LIMIT` times the median of the other sites. A site does not enter its own
  median, and one site among several barely moves the median of another.

A region's bound is `REGION_FACTOR` times wider.

Capping the sample counts that clients claim before weighting follows Portnoy, Tirosh and Hendler 2020, "Towards
Federated Learning With Byzantine-Robust Client Weighting" (arXiv:2004.04986).
"""

import bisect
import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

GROWTH = 2.0
"""A claim counts at most this many times the largest of the source's last `REMEMBERED` believed claims."""

REMEMBERED = 16

SITE_LIMIT = 3.0
"""An unregistered site counts at most this many times the median of the others.

A lower limit would hurt honest hospitals, whose sizes differ: cases above the limit do not count. A higher one would
let a liar win: in a region of five, a liar at the limit has three sevenths of the weight. At 4 it would have half, and
with a flipped delta the region would learn nothing.
"""

REGION_FACTOR = 3.0
"""Regions differ more than sites do: in their number of sites, and in which sites are in a sum."""


@dataclass(frozen=True, slots=True)
class Claim:
    """The mass that one contribution claims."""

    source: str
    mass: float
    """Number of samples, or the mass that a region computed."""
    of_region: bool = False
    """Whether the source is a region. Regions are compared with regions, sites with sites."""


@dataclass(slots=True)
class _Source:
    """One source's recent believed masses."""

    of_region: bool
    past: tuple[float, ...]
    """Newest last."""
    alone: bool
    """Whether there has been no other source to compare it with."""

    @property
    def usual(self) -> float:
        return statistics.median(self.past)


class Claims:
    """The recent believed masses of each source of one node, and the bounds that follow from them.

    >>> claims = Claims()
    >>> claims.expect({"a", "b", "large", "liar"}, {"large": 5000})
    >>> claims.believe([Claim("a", 300.0), Claim("b", 200.0), Claim("large", 6000.0), Claim("liar", 1e12)])
    (300.0, 200.0, 5000.0, 900.0)
    >>> claims.record([Claim("a", 300.0)])
    >>> claims.believe([Claim("a", 4000.0)])
    (600.0,)
    """

    def __init__(self) -> None:
        self._roster: Collection[str] = frozenset()
        self._registered: Mapping[str, int] = {}
        self._known: dict[str, _Source] = {}

    def expect(self, roster: Collection[str], registered: Mapping[str, int]) -> None:
        """Compare with the sources on ``roster`` from now on; ``registered`` has training cases by source."""
        self._roster, self._registered = roster, registered

    def believe(self, claims: Sequence[Claim]) -> tuple[float, ...]:
        """Return how much of each claim in one flush counts. Nothing is remembered until `record`."""
        limits = self.limits(claims)
        return tuple(min(claim.mass, limits[claim.source], self._grown(claim.source)) for claim in claims)

    def record(self, claims: Sequence[Claim]) -> None:
        """Remember the claims of a flush."""
        limits = self.limits(claims)
        believed = self.believe(claims)
        for source, known in self._known.items():
            if known.alone and limits[source] < math.inf:  # it now has others to be compared with
                known.past, known.alone = tuple(min(mass, limits[source]) for mass in known.past), False
        for claim, mass in zip(claims, believed, strict=True):
            alone = limits[claim.source] == math.inf
            known = self._known.setdefault(claim.source, _Source(claim.of_region, (), alone))
            known.past = (*known.past, mass)[-REMEMBERED:]

    def limits(self, claims: Sequence[Claim] = ()) -> dict[str, float]:
        """Return the bound on each source that is known or in ``claims``; infinity where there are no others.

        Once compared with others, an unregistered source keeps its usual mass: a neighbour with small claims takes
        nothing from it.
        """
        usual = self._usual(claims)
        limits: dict[str, float] = {}
        for of_region, factor in ((False, 1.0), (True, REGION_FACTOR)):
            others = _Others({source: mass for source, mass in usual[of_region].items() if source in self._roster})
            for source in usual[of_region]:
                if source in self._registered:
                    limits[source] = factor * self._registered[source]
                else:
                    limits[source] = max(factor * SITE_LIMIT * others.median(source), self._kept(source))
        return limits

    def _kept(self, source: str) -> float:
        """Return the mass that a source keeps, whatever the others claim."""
        known = self._known.get(source)
        return 0.0 if known is None or known.alone else known.usual

    def _usual(self, claims: Sequence[Claim]) -> dict[bool, dict[str, float]]:
        """Return the usual mass of each site (False) and region (True); a new source's is the median of ``claims``."""
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
    """Answers with the median of all masses but one.

    >>> _Others({"a": 1.0, "b": 2.0, "c": 3.0, "d": 9.0}).median("d"), _Others({"a": 1.0}).median("a")
    (2.0, inf)
    """

    def __init__(self, masses: Mapping[str, float]) -> None:
        self._masses = masses
        self._ordered = sorted(masses.values())

    def median(self, source: str) -> float:
        """Return the median of the others; the upper of two in the middle, so that a single low mass cannot set it."""
        n = len(self._ordered) - (source in self._masses)
        if not n:
            return math.inf
        place = bisect.bisect_left(self._ordered, self._masses[source]) if source in self._masses else n
        return self._ordered[n // 2 + (n // 2 >= place)]
