"""How many bytes may be under way in one direction of a connection: what the link takes, and no queue in front of it.

Too few leave a long link idle between the answers. Too many queue in front of a slow one: the answers come late, what
else is said on the connection comes later still, and a timeout that does not know of the queue sends all of it again.

The rule looks at answer times alone, as TCP Vegas does (Brakmo and Peterson, IEEE JSAC 13(8), 1995). The *base* is the
shortest answer time of late, when nothing queued. The *standing* time is the shortest within the last base: a burst has
a quick answer among its slow ones, a queue that stands has none. Of n bytes under way, n * (1 - base / standing) stand
in the queue. Few: the window grows. Many: it falls to what the link holds, so that the queue empties and the base shows.
"""

from collections import deque

FIRST_BYTES = 2**20
MOST_BYTES = 2**24
"""What a window grows to: 447 Mbit/s at a round trip of 300 ms. Also bounds the memory that a payload takes."""
PATIENCE_S = 30.0
"""Least wait for the answer to a chunk. A connection that died is noticed sooner."""

_BASE_AGE_S = 5.0
_BASE_AGE_ANSWERS = 10
_STANDING_S = 0.1
_QUEUED_SHARE = 0.2
_SHORT_S = 0.05
"""A queue that is no longer is let stand: what a disk or a busy process takes now and then looks the same."""
_LONG_S = 2.0
"""A queue that is longer is not let stand, though it be a single chunk."""
_GROWTH = 1 / 8
_FAR = 4
_TICK_S = 1e-6


class Window:
    """One direction of one connection. Times are of any clock that does not jump."""

    def __init__(self) -> None:
        self.size_bytes: float = FIRST_BYTES
        self.under_way_bytes = 0
        self._fell_to_bytes: float = 0
        self._fell_at = 0.0
        self._recent: deque[tuple[float, float]] = deque()  # (when it came, answer time), of the last base or 0.1 s
        self._base_since = 0.0
        self._base_s = [float("inf"), float("inf")]  # shortest answer time of the present and of the last period
        self._longest_s = [0.0, 0.0]

    @property
    def timeout_s(self) -> float:
        """How long to wait for the answer to a chunk before it counts as lost."""
        return max(PATIENCE_S, 4 * self.longest_s)

    @property
    def longest_s(self) -> float:
        """Longest answer time of the last seconds in which there were any; 0 before the first."""
        return max(self._longest_s)

    def fits(self, n_bytes: int) -> bool:
        """Whether so much may be sent now; with nothing under way, anything may, else half of it must fit."""
        return self.under_way_bytes == 0 or self.under_way_bytes + n_bytes / 2 <= self.size_bytes

    def sent(self, n_bytes: int) -> None:
        """Count what was sent."""
        self.under_way_bytes += n_bytes

    def lost(self, n_bytes: int) -> None:
        """Count what will not be answered any more."""
        self.under_way_bytes -= n_bytes

    def answered(self, n_bytes: int, answer_s: float, now: float) -> None:
        """Count an answer and adapt.

        >>> window = Window()
        >>> for now in (0.1, 0.2, 0.3):  # one chunk after the other: the window is not what limits
        ...     window.sent(2**18)
        ...     window.answered(2**18, 0.1, now)
        >>> window.size_bytes == FIRST_BYTES
        True
        >>> for _ in range(4):
        ...     window.sent(2**18)
        >>> window.answered(2**18, 0.1, 0.4)  # full, and answered as soon as when it was empty
        >>> window.size_bytes == FIRST_BYTES + 2**18
        True
        """
        full = not self.fits(n_bytes)
        under_way = self.under_way_bytes
        self.under_way_bytes -= n_bytes
        self._note(max(answer_s, _TICK_S), now)
        base_s, standing_s = min(self._base_s), min(taken_s for _, taken_s in self._recent)
        queued, queued_s = under_way * (1 - base_s / standing_s), standing_s - base_s
        if queued_s > _LONG_S or (queued_s > _SHORT_S and queued > max(n_bytes, _QUEUED_SHARE * under_way)):
            if now - self._fell_at > standing_s:
                self.size_bytes = self._fell_to_bytes = max(n_bytes, under_way * base_s / standing_s)
                self._fell_at = now
        elif full and standing_s < _LONG_S:
            # At the start, and when it is four times what it fell to without a queue: twice as much in each round trip.
            growth = n_bytes * (1 if self.size_bytes >= _FAR * self._fell_to_bytes else _GROWTH)
            self.size_bytes = min(MOST_BYTES, self.size_bytes + growth)

    def _note(self, answer_s: float, now: float) -> None:
        if now - self._base_since > max(_BASE_AGE_S, _BASE_AGE_ANSWERS * answer_s):
            self._base_since = now
            self._base_s = [float("inf"), self._base_s[0]]
            self._longest_s = [0.0, self._longest_s[0]]
        self._base_s[0] = min(self._base_s[0], answer_s)
        self._longest_s[0] = max(self._longest_s[0], answer_s)
        self._recent.append((now, answer_s))
        while self._recent[0][0] < now - max(_STANDING_S, min(self._base_s) / 2):
            self._recent.popleft()
