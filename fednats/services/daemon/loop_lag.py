"""Measure how late an event loop is: how long an event that arrives at a random moment waits for the loop."""

import asyncio
import math
from collections.abc import Callable

INTERVAL_S = 0.02

_FINEST_S = 1e-4
_GROWTH = 1.02
_N_BUCKETS = 1 + math.ceil(math.log(1000 / _FINEST_S, _GROWTH))


class LoopLag:
    """A histogram of lags, in buckets 2 % apart from 0.1 ms to 1000 s. Longer lags count in the last bucket."""

    def __init__(self) -> None:
        self._counts = [0] * _N_BUCKETS
        self._n = 0
        self._max_s = 0.0

    async def watch(self, observe: Callable[[float], None]) -> None:
        """Sleep, measure how late the sleep ended, and tell ``observe``, until cancelled.

        If the loop was held up, the wake-ups that it missed count too, each with the time it would have waited.
        Otherwise a long stop would be one sample among many short ones.
        """
        loop = asyncio.get_running_loop()
        due = loop.time() + INTERVAL_S
        while True:
            await asyncio.sleep(due - loop.time())
            now = loop.time()
            while due <= now:
                self.add(now - due)
                observe(now - due)
                due += INTERVAL_S

    def add(self, lag_s: float) -> None:
        """Count one lag, in seconds."""
        index = math.ceil(math.log(max(lag_s, _FINEST_S) / _FINEST_S, _GROWTH))
        self._counts[min(index, _N_BUCKETS - 1)] += 1
        self._n += 1
        self._max_s = max(self._max_s, lag_s)

    def quantile_s(self, share: float) -> float:
        """Return the lag, in seconds, that a share ``share`` of all lags do not exceed; 0 before the first.

        The result is at most 2 % too high.

        >>> lag = LoopLag()
        >>> for tenths_of_ms in range(1000):
        ...     lag.add(tenths_of_ms / 1e4)
        >>> 0.099 <= lag.quantile_s(0.99) <= 0.099 * 1.02
        True
        """
        wanted = math.ceil(share * self._n)
        seen = 0
        for index, count in enumerate(self._counts):
            seen += count
            if count and seen >= wanted:
                return min(_FINEST_S * _GROWTH**index, self._max_s)
        return 0.0

    def describe(self) -> dict[str, float]:
        """Return p50, p99 and max in milliseconds, and n, for /status."""
        figures = {"p50": self.quantile_s(0.5), "p99": self.quantile_s(0.99), "max": self._max_s}
        return {name: round(value * 1000, 2) for name, value in figures.items()} | {"n": self._n}
