"""Limit how fast one sender's messages are taken in, to the average rate of an honest sender.

An honest sender's rate follows from the versions that it sees. A site makes one update and one evaluation of each; it
makes more updates only while its bus is away, and keeps at most ``max_outbox`` of those. A region's sum has the updates
of at least two sites. So each new version earns a sender an allowance of at least twice its usual messages. Time earns
it a little too, for messages that waited while no version came. A sender that has spent its allowance is not refused:
the rest waits in its stream.
"""

from collections.abc import Callable
from time import monotonic

BURST = 256
"""Largest allowance, in messages, for a sender that was quiet: 64 times the default ``max_outbox``."""

OF_SITE = 4
"""Messages that a new version earns a site: its update and its evaluation, twice."""

OF_REGION = 128
"""Messages that a new version earns a region: sums of 200 sites' updates, two at a time, and of their evaluations."""

EACH_S = 1.0
"""Messages that each second earns."""

MESSAGE_BYTES = 2**14
"""Each full multiple of this size counts as one more message, because messages are journalled."""


class Pace:
    """The allowance of one sender. Each version earns ``per_version`` messages."""

    def __init__(self, per_version: int, clock: Callable[[], float] = monotonic) -> None:
        self._per_version = per_version
        self._clock = clock
        self._left = float(BURST)
        self._at_s = clock()
        self._version: int | None = None

    def allows(self, n_bytes: int, version: int) -> bool:
        """Whether a message of ``n_bytes`` may be taken in while ``version`` is current; if so, charge for it."""
        self._earn(version)
        if self._left < 1:
            return False
        self._left -= 1 + n_bytes // MESSAGE_BYTES  # may go below zero: the next ones wait
        return True

    @property
    def is_low(self) -> bool:
        """Whether less than half of the largest allowance was left at the last call of `allows`."""
        return self._left < BURST / 2

    def _earn(self, version: int) -> None:
        now_s = self._clock()
        n_versions = 0 if self._version is None else max(0, version - self._version)
        earned = (now_s - self._at_s) * EACH_S + n_versions * self._per_version
        self._left = min(self._left + earned, BURST)
        self._at_s, self._version = now_s, version
