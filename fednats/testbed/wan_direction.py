"""One direction of a link: bytes queue for the transmitter, leave at its rate, and arrive later, in order."""

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple, Protocol

QUEUE_S = 0.25
"""Length of the transmitter's queue, in time, as at a router; senders are held back while it is full."""

MAX_UNDER_WAY_BYTES = 256 * 1024 * 1024
"""Most bytes that one direction holds, queued and in flight; the only bound of a link with delay but no rate."""

_READ_S = 0.01
_MIN_READ_BYTES = 1500
_MAX_READ_BYTES = 256 * 1024


class Hold(Enum):
    """Why nothing is read from a sender."""

    CONNECTING = "the other end is not open yet"
    FULL = "the link's queue is full"
    SLOW = "the other end does not take what has arrived"
    CUT = "the link is cut"


class ByteSource(Protocol):
    """A sender that can be held back."""

    def hold(self, why: Hold) -> None:
        """Send nothing until released."""

    def release(self, why: Hold) -> None:
        """Go on, unless another reason holds."""


class _UnderWay(NamedTuple):
    arrives: float
    n_bytes: int
    arrive: Callable[[], None]


class Direction:
    """Carries bytes at ``rate``, in bytes per second (may be infinite); they arrive ``delay_s`` plus jitter later.

    Jitter is between 0 and ``jitter_s``. Times are the running loop's.
    """

    def __init__(self, rate: float, delay_s: float, jitter_s: float, seed: int) -> None:
        self.read_bytes = int(min(max(rate * _READ_S, _MIN_READ_BYTES), _MAX_READ_BYTES))
        """Most bytes to send at once; they set the grain of the delay, and of fairness between connections."""
        self.crossed_bytes = 0
        self._rate = rate
        self._delay_s = delay_s
        self._jitter_s = jitter_s
        self._random = random.Random(seed)
        self._instant = rate == math.inf and not delay_s and not jitter_s
        self._is_cut = False
        self._under_way: deque[_UnderWay] = deque()
        self._under_way_bytes = 0
        self._idle_at = 0.0  # when the transmitter's queue is empty
        self._last_arrival = 0.0
        self._held: dict[ByteSource, None] = {}
        self._arrival: asyncio.TimerHandle | None = None
        self._room: asyncio.TimerHandle | None = None

    def carry(self, sender: ByteSource, n_bytes: int, arrive: Callable[[], None]) -> None:
        """Call ``arrive`` when ``n_bytes`` sent now have crossed; never, if the link is cut before that."""
        if self._is_cut:
            return
        if self._instant:
            self.crossed_bytes += n_bytes
            arrive()
            return
        now = asyncio.get_running_loop().time()
        self._idle_at = max(now, self._idle_at) + n_bytes / self._rate
        arrives = self._idle_at + self._delay_s + self._random.uniform(0, self._jitter_s)
        self._last_arrival = max(self._last_arrival, arrives)
        self._under_way.append(_UnderWay(self._last_arrival, n_bytes, arrive))
        self._under_way_bytes += n_bytes
        if self._arrival is None:
            self._await_arrival()
        if self._idle_at - now > QUEUE_S or self._under_way_bytes > MAX_UNDER_WAY_BYTES:
            sender.hold(Hold.FULL)
            self._held[sender] = None
            self._make_room()

    def cut(self) -> None:
        """Lose all bytes under way, and all that are sent from now on."""
        self._is_cut = True
        self._under_way.clear()
        self._under_way_bytes = 0
        self._held.clear()
        for timer in (self._arrival, self._room):
            if timer is not None:
                timer.cancel()
        self._arrival = self._room = None

    def restore(self) -> None:
        """Carry again, from an empty queue."""
        self._is_cut = False
        self._idle_at = self._last_arrival = 0.0

    def _await_arrival(self) -> None:
        self._arrival = asyncio.get_running_loop().call_at(self._under_way[0].arrives, self._arrive)

    def _arrive(self) -> None:
        self._arrival = None
        now = asyncio.get_running_loop().time()
        while self._under_way and self._under_way[0].arrives <= now:
            _, n_bytes, arrive = self._under_way.popleft()
            self._under_way_bytes -= n_bytes
            self.crossed_bytes += n_bytes
            arrive()
        if self._under_way:
            self._await_arrival()
        self._make_room()

    def _make_room(self) -> None:
        """Release senders when half of the queue is free, or set a timer for that moment."""
        if not self._held or self._room is not None:
            return
        loop = asyncio.get_running_loop()
        if (free_at := self._idle_at - QUEUE_S / 2) > loop.time():
            self._room = loop.call_at(free_at, self._look_again)
        elif self._under_way_bytes <= MAX_UNDER_WAY_BYTES / 2:
            held, self._held = self._held, {}
            for sender in held:
                sender.release(Hold.FULL)

    def _look_again(self) -> None:
        self._room = None
        self._make_room()
