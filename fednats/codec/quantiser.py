"""Stochastic rounding to the announced grid, with error feedback.

Rounding up with probability equal to the fraction makes every quantised value right on average (QSGD, Alistarh et al.
2017, arXiv:1610.02132, section 3.1). What rounding and clipping lose is added to the next delta (error feedback,
Karimireddy et al. 2019, arXiv:1901.09847, algorithm 2), so it arrives later instead of never.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fednats.errors import LocalDataError

QMAX = {8: 127, 4: 7}
"""Largest magnitude of a quantised value, by value bits."""


@dataclass(frozen=True)
class Quantised:
    """Quantised values and the error they leave."""

    values: NDArray[np.int8]
    """int8[n], in [-qmax, qmax]."""
    residual: NDArray[np.float32]
    """float32[n]: the input minus ``values * steps``."""
    n_saturated: int
    """Values that the grid clipped."""


def quantise(values: NDArray[np.float32], steps: NDArray[np.float32], qmax: int, rng: np.random.Generator) -> Quantised:
    """Round ``values`` float32[n] stochastically to multiples of ``steps`` float32[n], clipped at ``qmax`` steps.

    Raises:
        LocalDataError: a value is not finite.

    >>> quantised = quantise(np.float32([0.5, -0.25, 9.0]), np.float32([0.25] * 3), 7, np.random.default_rng(0))
    >>> quantised.values.tolist(), quantised.residual.tolist(), quantised.n_saturated
    ([2, -1, 7], [0.0, 0.0, 7.25], 1)
    """
    finite = np.isfinite(values)
    if not finite.all():
        raise LocalDataError(
            f"{int(values.size - finite.sum())} of {values.size} values of the delta are not finite; lower the"
            " learning rate or look for broken samples"
        )
    with np.errstate(over="ignore"):  # a value far beyond the grid overflows to infinity and is then clipped
        rounded = values / steps
    rounded += rng.random(values.size, dtype=np.float32)
    np.floor(rounded, out=rounded)
    clipped = np.clip(rounded, -qmax, qmax)
    n_saturated = int(np.count_nonzero(clipped != rounded))
    return Quantised(clipped.astype(np.int8), values - clipped * steps, n_saturated)
