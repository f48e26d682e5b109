"""Differential privacy of a whole site: its delta clipped, rounded towards zero, and noise on every integer.

The Skellam mechanism, Agarwal, Kairouz and Liu 2021 (arXiv:2110.04995). Every site adds all the noise that its own guarantee
takes, so the guarantee is each update's own: it holds for the ciphertext, for a sum with any weights, and if no other site adds
any. What it costs is `rdp.skellam`; `docs/privacy.md` has the argument.
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
"""Clipped norms stay below the limit by more than float64 arithmetic can be wrong."""

LEAST_VARIANCE = 1e-9
"""Squared steps; `rdp.skellam` bounds the cost on whatever grid by the cost at this variance."""


class SkellamRounding:
    """Clips, rounds and adds noise to one delta with its residual; a `fednats.delta.encode.Rounding`.

    Rounding is towards zero: it lengthens nothing, so the sensitivity is the clip norm itself, where stochastic rounding adds up
    to a quarter of the number of values to its square (Kairouz, Liu and Steinke 2021, arXiv:2102.06387, proposition 22). What
    it cuts off is the residual and comes with the next update. What clipping and noise took is not: it would take the
    noise back.
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
        """Round the part ``values`` float32[n] of delta plus residual; returns what is sent, with noise, and what is kept.

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
    """Variance of the noise in squared steps, for noise of ``deviation`` in units of the model."""
    return (deviation / step) ** 2


def smallest_variance(settings: SitePrivacySettings, layout: Layout, grid: Grid) -> float:
    """Variance on the tensor with the largest step, which is what `rdp.skellam` asks for."""
    of_values = [step for step, part in zip(grid.steps, layout.slices, strict=True) if part.stop > part.start]
    return variance(settings.deviation, max(of_values))


def clip_factor(delta: Vector, residual: Vector, clip_norm: float) -> float:
    """What ``delta + residual`` is multiplied by so that its L2 norm is at most ``clip_norm``; 1 if it is already.

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
