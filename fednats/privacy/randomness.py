"""Unpredictable, unrepeatable randomness for privacy noise and Poisson sampling.

A site draws everything else from the run's announced seed. Anybody could compute and subtract noise drawn from it, so
noise comes from the operating system's cryptographic generator and is not stored.
"""

import math
import os
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

MAX_DEVIATION = 2.0**17
"""Largest standard deviation of integer noise, in steps of the grid."""

_TABLE_VARIANCE = 2.0**28
"""Largest variance of one table; larger noise is the sum of several draws, which is Skellam too."""

_TAIL = 12.0  # in standard deviations; the probability beyond is far below the 2^-53 of a float64


class Randomness:
    """Draws from ``entropy``, which returns n random bytes; tests may replace it.

    >>> bool((Randomness().uniform(3) == Randomness().uniform(3)).any())
    False
    """

    def __init__(self, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._entropy = entropy

    def seed(self) -> int:
        """Return a seed of 63 bits for a generator that must not follow from the run's seed."""
        return int.from_bytes(self._entropy(8), "little") >> 1

    def uniform(self, n: int) -> NDArray[np.float64]:
        """Draw values in (0, 1], multiples of 2^-53, float64[n]."""
        bits = np.frombuffer(self._entropy(8 * n), dtype="<u8") >> np.uint64(11)
        return (bits.astype(np.float64) + 1.0) * 2.0**-53

    def normal(self, n: int) -> NDArray[np.float64]:
        """Draw standard normal values, float64[n].

        Each is half the sum of four draws, so that the gaps between floating-point numbers do not reveal the value
        under the noise (Holohan and Braghin 2021, arXiv:2107.10138, section 5.1).
        """
        radius, angle = self.uniform(4 * n), self.uniform(4 * n)
        values = np.sqrt(-2.0 * np.log(radius)) * np.cos(2.0 * np.pi * angle)  # Box and Muller 1958
        return np.asarray(values.reshape(4, n).sum(axis=0) / 2.0)

    def skellam(self, variance: float, n: int) -> NDArray[np.int32]:
        """Draw symmetric Skellam values, int32[n]: differences of two Poisson variables of ``variance`` / 2 each.

        Raises:
            ValueError: the standard deviation is above `MAX_DEVIATION`.
        """
        if variance > MAX_DEVIATION**2:
            raise ValueError(f"noise of {variance**0.5:g} steps of the grid; at most {MAX_DEVIATION:g} are drawn")
        n_terms = math.ceil(variance / _TABLE_VARIANCE)
        first, cumulative = _skellam_table(variance / n_terms)
        total = np.zeros(n, np.int32)
        for _ in range(n_terms):
            total += (first + np.searchsorted(cumulative, self.uniform(n))).astype(np.int32)
        return total


@lru_cache(maxsize=64)
def _skellam_table(variance: float) -> tuple[int, NDArray[np.float64]]:
    """Return the smallest value in the table, and the cumulative probabilities from it on.

    The probability of k is exp(-v) I_|k|(v), v the variance, I the modified Bessel function (Skellam 1946).

    >>> first, cumulative = _skellam_table(4.0)
    >>> round(float(cumulative[-first] - cumulative[-first - 1]), 6), bool(cumulative[-1] == 1.0)
    (0.207002, True)
    """
    from scipy.special import ive  # noqa: PLC0415 - loaded where whole deltas get noise

    last = int(_TAIL * variance**0.5) + 40
    probabilities = ive(np.abs(np.arange(-last, last + 1)), variance)
    cumulative = np.cumsum(probabilities)
    return -last, cumulative / cumulative[-1]
