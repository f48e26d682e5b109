"""How the coordinator chooses quantisation steps: one per tensor, powers of two, changed seldom.

Updates quantised on different grids cannot be added, so every change costs updates under way. The rule, and why it
settles, are in ``docs/encrypted-delta.md``.
"""

import hashlib
import math
import struct

import numpy as np

from fednats.codec.layout import Layout, Vector
from fednats.messages import Grid

MIN_RANGE = 0.02
"""Smallest initial range of a tensor, so that tensors that begin as zeros (biases) can move."""

STATISTIC_RANGE = 1.0
"""Smallest initial range of a running statistic, which moves to the data's values wherever it starts."""

SATURATION_HIGH = 0.05
"""Share of clipped values above which steps grow."""

SATURATION_LOW = 1e-5
"""Share of clipped values below which halving a range cannot bring it above `SATURATION_HIGH` (Gaussian deltas)."""

FULL = 1 / 3
"""Mean magnitude over range above which a tensor's step grows, whatever the other tensors do."""

COARSE = {127: 1 / 64, 7: 1 / 16}
"""Mean magnitude over range below which the range is shrunk, by the largest quantised value."""

_GROW = ((0.5, 8.0), (0.1, 4.0), (SATURATION_HIGH, 2.0))  # (share of clipped values, factor if it is exceeded)
_MAX_SHRINK = 2.0**-7

MIN_STEP = 2.0**-100
"""Steps never shrink below this, however small the deltas become.

A delta is divided by steps in float32. At 2^-100 every multiple of a step is a normal float32 (smallest 2^-126), and
dividing a delta of up to 2^27 stays finite (largest 2^128). A step of 2^-150 would be zero.
"""


NOISE_RANGE = 6.0
"""Range of a tensor in standard deviations of the noise that sites add to each value; little noise is clipped."""


def initial(layout: Layout, weights: Vector, qmax: int, noise: float = 0.0, first_version: int = 0) -> Grid:
    """Choose the first grid of a run: a tensor's range is the root mean square of its ``weights``, or a minimum.

    Args:
        layout: of the model.
        weights: float32[n_parameters], the model that the run begins with.
        qmax: largest magnitude of a quantised value, 127 or 7.
        noise: standard deviation of the noise that sites add (`SitePrivacySettings`); ranges hold `NOISE_RANGE` of it.
        first_version: of the run. Every grid id of the run begins with it, so runs do not share grids.
    """
    smallest = np.maximum(np.where(layout.statistics, STATISTIC_RANGE, MIN_RANGE), NOISE_RANGE * noise)
    ranges = np.maximum(np.sqrt(layout.means(weights, np.square)), smallest)
    return _grid(str(first_version), tuple(2.0 ** round(math.log2(value / qmax)) for value in ranges))


def adapt(grid: Grid, layout: Layout, mean_delta: Vector, n_saturated: int, n_values: int, qmax: int) -> Grid:
    """Return the next version's grid: ``grid`` itself unless it is clearly too fine or too coarse.

    Args:
        grid: grid on which the deltas were quantised.
        layout: of the model.
        mean_delta: float32[n_parameters], the decrypted weighted mean.
        n_saturated: values clipped, over all sites.
        n_values: values sent, over all sites.
        qmax: largest magnitude of a quantised value.
    """
    saturation = n_saturated / max(n_values, 1)
    fill = layout.means(mean_delta, np.abs) / (np.array(grid.steps) * qmax)
    factors = [_factor(float(value), saturation, float(fill.max(initial=0.0)), qmax) for value in fill]
    steps = tuple(max(step * factor, min(step, MIN_STEP)) for step, factor in zip(grid.steps, factors, strict=True))
    return grid if steps == grid.steps else _grid(grid.grid_id.partition("-")[0], steps)


def _factor(fill: float, saturation: float, fullest: float, qmax: int) -> float:
    """Return a step's factor, from its tensor's mean magnitude over range and the overall share of clipped values.

    >>> _factor(0.02, saturation=0.0, fullest=0.02, qmax=127), _factor(0.2, saturation=0.2, fullest=0.3, qmax=127)
    (1.0, 4.0)
    >>> _factor(0.001, saturation=0.0, fullest=0.2, qmax=127)
    0.03125
    """
    if saturation > SATURATION_HIGH and fill >= fullest / 2:
        if fill < COARSE[qmax] / 4:
            return 1.0  # a tiny mean with heavy clipping is implausible: someone misreports saturation
        return next(factor for share, factor in _GROW if saturation > share)
    if fill > FULL:
        return 2.0
    # if anything is clipped, it may be this tensor, with sites that disagree: shrink only well below the limit
    coarse = COARSE[qmax] / (1 if saturation < SATURATION_LOW else 4)
    if 0 < fill < coarse:
        return max(2.0 ** -math.floor(math.log2(4 * COARSE[qmax] / fill)), _MAX_SHRINK)
    return 1.0


def _grid(run: str, steps: tuple[float, ...]) -> Grid:
    digest = hashlib.blake2b(struct.pack(f"<{len(steps)}d", *steps), digest_size=16).hexdigest()
    return Grid(grid_id=f"{run}-{digest}", steps=steps)
