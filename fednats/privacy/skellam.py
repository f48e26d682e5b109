"""Differential privacy of a whole site: clip its delta, round it towards zero, add noise to every integer.

The Skellam mechanism, Agarwal, Kairouz and Liu 2021 (arXiv:2110.04995). Every site adds all the noise that its own
guarantee needs. So the guarantee holds for each update by itself: for the ciphertext, for a sum with any weights, and
even if no other site adds noise. `rdp.skellam` computes the cost; `docs/privacy.md` has the argument.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fednats.codec.layout import Layout, Vector, blocks
from fednats.codec.quantiser import Quantised
from fednats.config import SitePrivacySettings
from fednats.errors import LocalDataError
from fednats.messages import Grid
from fednats.privacy.randomness import MAX_DEVIATION, Randomness

_BELOW = 1 - 1e-9
"""Keeps clipped norms below the limit by more than the error of float64 arithmetic."""

LEAST_VARIANCE = 1e-9
"""In squared steps. The cost of `rdp.skellam` at this variance bounds its cost on any grid."""


class SkellamRounding:
    """Clips one delta with its residual, rounds it and adds noise; a `fednats.delta.encode.Rounding`.

    Rounding towards zero never lengthens the delta, so the sensitivity is the clip norm. Stochastic rounding adds up to
    a quarter of the number of values to its square (Kairouz, Liu and Steinke 2021, arXiv:2102.06387, proposition 22).
    What rounding cuts off is the residual and goes into the next update. What clipping and noise change does not: that
    would remove the noise again.
    """

    def __init__(
        self,
        settings: SitePrivacySettings,
        delta: Vector,
        residual: Vector,
        randomness: Randomness | None = None,
    ) -> None:
        self._deviation = settings.deviation
        self._randomness = randomness or Randomness()
        self._factor = clip_factor(delta, residual, settings.clip_norm)

    def __call__(self, values: NDArray[np.float32], steps: NDArray[np.float32], qmax: int) -> Quantised:
        """Round ``values`` float32[n], a part of delta plus residual; return noisy integers and the new residual.

        Raises:
            LocalDataError: a value is not finite, or the noise is too large for the grid.
        """
        clipped = values.astype(np.float64) * self._factor
        rounded = np.trunc(clipped / steps)
        noisy = rounded + self._noise(steps)
        sent = np.clip(noisy, -qmax, qmax)
        return Quantised(
            values=sent.astype(np.int8),
            residual=(clipped - rounded * steps).astype(np.float32),
            n_saturated=int(np.count_nonzero(sent != noisy)),
        )

    def _noise(self, steps: NDArray[np.float32]) -> NDArray[np.int32]:
        noise = np.empty(steps.size, np.int32)
        for step in np.unique(steps):
            of_step = steps == step
            if self._deviation / step > MAX_DEVIATION:
                raise LocalDataError(
                    f"the noise of delta.dp is {self._deviation / step:.3g} steps of the grid wide, at most"
                    f" {MAX_DEVIATION:g} can be drawn; lower clip_norm"
                )
            noise[of_step] = self._randomness.skellam(variance(self._deviation, float(step)), int(of_step.sum()))
        return noise


def variance(deviation: float, step: float) -> float:
    """Return the variance of the noise in squared steps, given its ``deviation`` in units of the model."""
    return (deviation / step) ** 2


def smallest_variance(settings: SitePrivacySettings, layout: Layout, grid: Grid) -> float:
    """Return the noise variance on the tensor with the largest step, the ``variance`` for `rdp.skellam`."""
    of_values = [step for step, part in zip(grid.steps, layout.slices, strict=True) if part.stop > part.start]
    return variance(settings.deviation, max(of_values))


def clip_factor(delta: Vector, residual: Vector, clip_norm: float) -> float:
    """Return the factor, at most 1, that brings the L2 norm of ``delta + residual`` to at most ``clip_norm``.

    Raises:
        LocalDataError: a value is not finite.

    >>> ones = np.ones(4, np.float32)
    >>> round(clip_factor(ones, ones, clip_norm=1.0), 6), clip_factor(ones, ones, clip_norm=5.0)
    (0.25, 1.0)
    """
    square = 0.0
    for block in blocks(len(delta)):
        values = (delta[block] + residual[block]).astype(np.float64)
        square += float(np.dot(values, values))
    if not math.isfinite(square):
        raise LocalDataError("the delta is not finite; lower the learning rate or look for broken samples")
    norm = math.sqrt(square)
    return 1.0 if norm <= clip_norm * _BELOW else clip_norm * _BELOW / norm
