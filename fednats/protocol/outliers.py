"""Finds sums whose L2 norm is far above the usual.

The coordinator sees a sum only as a whole, and its length is what most often betrays a poisoned one. Log norms are
compared by the modified z-score. It uses median and median absolute deviation (MAD) instead of mean and deviation, so
that an outlier barely moves the measure (Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers", who advise a
threshold of 3.5). Only large norms count: a short sum moves the model little.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from fednats.config import DefenceSettings

MIN_HISTORY = 8
"""Fewest norms of earlier sums before a sum can be called an outlier."""

MAD_TO_DEVIATION = 1.4826
"""Standard deviation of a Gaussian divided by its MAD."""

OWN_FLOOR = 3.0
"""A sum up to this many times its region's median norm is no outlier, however alike the norms were."""

ALL_FLOOR = 6.0
"""The same for the norms of all regions: honest regions differ in their number of sites and in their data."""


START = 8
"""The largest of this many first norms passes at any time. When a hospital joins or comes back, norms rise to where
they were at the beginning, far above those of a model that had converged."""


ALARM = 100.0
"""A norm this many times the median of those before it raises an alarm, whether or not a sum is left out."""


class NormAlarm:
    """Detects a delta whose norm is a hundred times the usual one of the same run.

    >>> alarm = NormAlarm()
    >>> [alarm.median_if_jumped(1.0, 0) for _ in range(8)][-1], alarm.median_if_jumped(99.0, 0)
    (None, None)
    >>> alarm.median_if_jumped(101.0, 0), alarm.median_if_jumped(1e6, 40)
    (1.0, None)
    """

    def __init__(self) -> None:
        self._run = -1
        self._norms: deque[float] = deque(maxlen=64)

    def median_if_jumped(self, norm: float, run: int) -> float | None:
        """Count ``norm``; return the median of the norms before it if it is at least `ALARM` times that, else None.

        The alarm needs `MIN_HISTORY` earlier norms. ``run`` is the first version of the run: norms of other runs do not
        count.
        """
        if run != self._run:
            self._run = run
            self._norms.clear()
        median = statistics.median(self._norms) if len(self._norms) >= MIN_HISTORY else math.inf
        if norm > 0:
            self._norms.append(norm)
        return median if norm >= ALARM * median else None


@dataclass(frozen=True, slots=True)
class NormLimit:
    """The largest norm that passes, and how it was derived."""

    norm: float
    median: float
    n: int
    """Number of norms it was derived from."""
    of: str
    """Source of the norms: the name of a region, or ``all regions``."""


class NormHistory:
    """The norms of the applied sums, per region and over all.

    >>> history = NormHistory(DefenceSettings())
    >>> for norm in (1.0, 1.1, 0.9, 1.0, 1.2, 1.0, 0.8, 1.0):
    ...     history.add("north", norm)
    >>> history.outliers({"s1": ("north", 2.9), "s2": ("north", 3.1)}).keys()
    dict_keys(['s2'])
    """

    def __init__(self, settings: DefenceSettings) -> None:
        self._n = 0
        self._at_start = -math.inf
        self._all: deque[float] = deque()
        self._own: dict[str, deque[float]] = {}
        self.configure(settings)

    def configure(self, settings: DefenceSettings) -> None:
        """Continue with other settings; known norms stay, as far back as the new window reaches."""
        self._settings = settings
        self._all = deque(self._all, settings.outlier_window)
        self._own = {region: deque(norms, settings.outlier_window) for region, norms in self._own.items()}

    def add(self, region: str, norm: float) -> None:
        """Count the norm of an applied sum."""
        if norm > 0:
            self._n += 1
            if self._n <= START:
                self._at_start = max(self._at_start, math.log(norm))
            self._all.append(math.log(norm))
            self._own.setdefault(region, deque(maxlen=self._settings.outlier_window)).append(math.log(norm))

    def outliers(self, norms: Mapping[str, tuple[str, float]]) -> dict[str, str]:
        """Return the outliers among these sums, ``id: (region, norm)``, each with the reason in words."""
        found = {}
        for identity, (region, norm) in norms.items():
            limit = self.limit(region)
            if limit is not None and norm > limit.norm:
                found[identity] = (
                    f"norm {norm:.4g}, the limit is {limit.norm:.4g}: the median of the last {limit.n} norms of"
                    f" {limit.of} is {limit.median:.4g}"
                )
        return found

    def limit(self, region: str) -> NormLimit | None:
        """Return the lower of the region's own limit and that of all regions; None if off or without enough norms."""
        if not self._settings.quarantine:
            return None
        own = self._limit(self._own.get(region, deque()), OWN_FLOOR, region)
        of_all = self._limit(self._all, ALL_FLOOR, "all regions")
        return min((limit for limit in (own, of_all) if limit is not None), key=lambda one: one.norm, default=None)

    def _limit(self, logs: deque[float], floor: float, of: str) -> NormLimit | None:
        if len(logs) < MIN_HISTORY:
            return None
        median = statistics.median(logs)
        deviation = MAD_TO_DEVIATION * statistics.median(abs(value - median) for value in logs)
        above = max(self._settings.outlier_threshold * deviation, math.log(floor))
        highest = max(median + above, self._at_start)
        return NormLimit(math.exp(min(highest, 700.0)), math.exp(median), len(logs), of)
