"""How many bytes may be under way in one direction of a connection: enough to fill the link, without a queue.

With too few, a long link is idle between answers. With too many, a queue forms in front of a slow link: answers come
late, other messages on the connection come later still, and a timeout that ignores the queue sends everything again.

The rule uses answer times alone, as TCP Vegas does (Brakmo and Peterson, IEEE JSAC 13(8), 1995). The *base* is the
shortest recent answer time, measured while nothing was queued. The *standing* time is the shortest within the last half
base (at least 0.1 s): a burst has a quick answer among its slow ones, a standing queue has none. Of n bytes under way,
n * (1 - base / standing) are in the queue. If they are few, the window grows. If they are many, it falls to what the
link holds; the queue then empties, and the base can be measured again.
"""

from collections import deque

FIRST_BYTES = 2**20
MOST_BYTES = 2**24
"""Largest window: 447 Mbit/s at a round trip of 300 ms. It also bounds the memory that a payload takes."""
PATIENCE_S = 30.0
"""Shortest wait for the answer to a chunk. A dead connection is noticed sooner."""

_BASE_AGE_S = 5.0
_BASE_AGE_ANSWERS = 10
_STANDING_S = 0.1
_QUEUED_SHARE = 0.2
_SHORT_S = 0.05
"""A shorter queue is left alone: a slow disk or a busy process looks the same."""
_LONG_S = 2.0
"""A longer queue is never left alone, even if it is a single chunk."""
_GROWTH = 1 / 8
_FAR = 4
_TICK_S = 1e-6


class Window:
    """One direction of one connection. Times are in seconds of any monotonic clock."""

    def __init__(self) -> None:
        self.size_bytes: float = FIRST_BYTES
        self.under_way_bytes = 0
        self._fell_to_bytes: float = 0
        self._fell_at = 0.0
        self._recent: deque[tuple[float, float]] = deque()  # (arrival, answer time), of the last half base or 0.1 s
        self._base_since = 0.0
        self._base_s = [float("inf"), float("inf")]  # shortest answer time of this period and of the last
        self._longest_s = [0.0, 0.0]

    @property
    def timeout_s(self) -> float:
        """Wait for the answer to a chunk before it counts as lost."""
        return max(PATIENCE_S, 4 * self.longest_s)

    @property
    def longest_s(self) -> float:
        """Longest answer time of the last two periods, each of 5 s or 10 answer times; 0 before the first answer."""
        return max(self._longest_s)

    def fits(self, n_bytes: int) -> bool:
        """Whether ``n_bytes`` may be sent now: always if nothing is under way, else if half of them fit."""
        return self.under_way_bytes == 0 or self.under_way_bytes + n_bytes / 2 <= self.size_bytes

    def sent(self, n_bytes: int) -> None:
        """Count bytes as sent."""
        self.under_way_bytes += n_bytes

    def lost(self, n_bytes: int) -> None:
        """Count sent bytes as never to be answered."""
        self.under_way_bytes -= n_bytes

    def answered(self, n_bytes: int, answer_s: float, now: float) -> None:
        """Count an answer and adapt the window.

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
            # Doubles each round trip at the start, and once it has grown to four times the size it last fell to.
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
