"""How fast one sender's messages are taken in: as fast as an honest one may send, on average, and no faster.

What an honest sender sends follows from the versions that it sees. A site makes one update and one evaluation of each; it
makes more updates only while its bus is away, and keeps no more than ``max_outbox`` of those. A region's sum is of two
sites' updates at least. So each new version earns a sender an allowance of twice that and more, and time earns it a little, for
what waited while no version came. A sender that has spent its allowance is not refused: the rest waits in its stream.
"""

from collections.abc import Callable
from time import monotonic

BURST = 256
"""Messages that are taken in at once from a sender that was quiet: 64 times the usual ``max_outbox``."""

OF_SITE = 4
"""Messages that a new version earns a site: its update and its evaluation, twice."""

OF_REGION = 128
"""Messages that a new version earns a region: sums of the updates of 200 sites, two at a time, and their evaluations."""

EACH_S = 1.0
"""Messages that a second earns."""

MESSAGE_BYTES = 2**14
"""A larger message counts as several: what is taken in is journalled."""


class Pace:
    """The allowance of one sender; ``per_version`` messages are earned by each version."""

    def __init__(self, per_version: int, clock: Callable[[], float] = monotonic) -> None:
        self._per_version = per_version
        self._clock = clock
        self._left = float(BURST)
        self._at_s = clock()
        self._version: int | None = None

    def allows(self, n_bytes: int, version: int) -> bool:
        """Whether a message of ``n_bytes`` may be taken in now that ``version`` is current; if so, it counts."""
        self._earn(version)
        if self._left < 1:
            return False
        self._left -= 1 + n_bytes // MESSAGE_BYTES  # the next ones wait until a large one is paid for
        return True

    @property
    def is_low(self) -> bool:
        """Whether less than half of the allowance was left when it was last asked for."""
        return self._left < BURST / 2

    def _earn(self, version: int) -> None:
        now_s = self._clock()
        n_versions = 0 if self._version is None else max(0, version - self._version)
        earned = (now_s - self._at_s) * EACH_S + n_versions * self._per_version
        self._left = min(self._left + earned, BURST)
        self._at_s, self._version = now_s, version
