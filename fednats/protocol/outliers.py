"""Which sums are far from what sums usually are, by their L2 norms.

The coordinator sees a sum only as a whole; its length is what a poisoned one most often gives itself away by. Log norms
are compared by the modified z-score, with median and median absolute deviation (MAD) in place of mean and deviation, so
that what is looked for does not move the measure (Iglewicz and Hoaglin 1993, "How to Detect and Handle Outliers", who
advise 3.5). Only the upper side counts: a short sum moves the model little.
"""

import math
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from fednats.config import DefenceSettings

MIN_HISTORY = 8
"""Norms of earlier sums without which nothing is said."""

MAD_TO_DEVIATION = 1.4826
"""Of a Gaussian."""

OWN_FLOOR = 3.0
"""However alike a region's norms were: a sum up to so many times their median is no outlier."""

ALL_FLOOR = 6.0
"""The same for the norms of all regions; honest regions differ by their number of sites and by their data."""


START = 8
"""The longest of so many first sums passes at any time: when a hospital comes back, or a new one comes, norms rise to where
they were at the beginning, far above those of a model that had come to rest."""


ALARM = 100.0
"""A norm so many times the median of those before it is an alarm, whether or not anything is left out."""


class NormAlarm:
    """Tells when the norm of a delta is a hundred times what it was in the same run.

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
        """Count ``norm``; return the median of those before if it is `ALARM` times that, and there are `MIN_HISTORY`.

        ``run`` is the first version of the run that it is of: norms of another run say nothing of this one's.
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
    """The largest norm that passes, and what it follows from."""

    norm: float
    median: float
    n: int
    """Norms that it follows from."""
    of: str
    """Whose norms: a region's, or of all regions."""


class NormHistory:
    """The norms of the sums that were applied, per region and over all.

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
        """Go on with other settings; what is known stays, as far as the window reaches."""
        self._settings = settings
        self._all = deque(self._all, settings.outlier_window)
        self._own = {region: deque(norms, settings.outlier_window) for region, norms in self._own.items()}

    def add(self, region: str, norm: float) -> None:
        """Count the norm of a sum that was applied."""
        if norm > 0:
            self._n += 1
            if self._n <= START:
                self._at_start = max(self._at_start, math.log(norm))
            self._all.append(math.log(norm))
            self._own.setdefault(region, deque(maxlen=self._settings.outlier_window)).append(math.log(norm))

    def outliers(self, norms: Mapping[str, tuple[str, float]]) -> dict[str, str]:
        """Return which of these sums, ``id: (region, norm)``, are outliers, each with the reason in words."""
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
        """Return the lower of a region's own limit and that of all; None if nothing is said."""
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
