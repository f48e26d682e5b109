"""The coordinator's choice of quantisation steps: one per tensor, powers of two, changed seldom.

Updates quantised on different grids cannot be added, so every change costs the updates under way. The rule and why it
settles are in ``docs/encrypted-delta.md``.
"""

import hashlib
import math
import struct

import numpy as np

from fednats.codec.layout import Layout, Vector
from fednats.messages import Grid

MIN_RANGE = 0.02
"""Smallest range of a tensor at the start; tensors that begin as zeros (biases) still move."""

STATISTIC_RANGE = 1.0
"""Smallest range of a running statistic at the start: it goes from 0 to what the data have, whatever it is at first."""

SATURATION_HIGH = 0.05
"""Share of clipped values above which steps grow."""

SATURATION_LOW = 1e-5
"""Share of clipped values below which halving a range cannot lead above `SATURATION_HIGH` (Gaussian deltas)."""

FULL = 1 / 3
"""Mean magnitude over range above which a tensor is clipped whatever the other tensors do."""

COARSE = {127: 1 / 64, 7: 1 / 16}
"""Largest quantised value to the mean magnitude over range below which the range is shrunk."""

_GROW = ((0.5, 8.0), (0.1, 4.0), (SATURATION_HIGH, 2.0))  # share clipped above which the range grows by so much
_MAX_SHRINK = 2.0**-7

MIN_STEP = 2.0**-100
"""No step becomes smaller, however small the deltas become.

Steps are float32 where a delta is divided by them. From 2^-100 on, every multiple of a step is a normal float32 (they begin
at 2^-126), and a delta of up to 2^27 divided by it is finite (they end at 2^128); at 2^-150 a step would be zero.
"""


NOISE_RANGE = 6.0
"""Range of a tensor over the standard deviation of the noise that sites add to every value; little of it is clipped."""


def initial(layout: Layout, weights: Vector, qmax: int, noise: float = 0.0, first_version: int = 0) -> Grid:
    """Steps before any delta is known: a tensor's range is the root mean square of its ``weights``.

    Args:
        layout: of the model.
        weights: float32[n_parameters], the model that a run begins with.
        qmax: largest magnitude of a quantised value, 127 or 7.
        noise: standard deviation of the noise that sites add on purpose (`SitePrivacySettings`); a range holds it.
        first_version: of the run. It is in the ids of all the run's grids: no two runs have one in common.
    """
    smallest = np.maximum(np.where(layout.statistics, STATISTIC_RANGE, MIN_RANGE), NOISE_RANGE * noise)
    ranges = np.maximum(np.sqrt(layout.means(weights, np.square)), smallest)
    return _grid(str(first_version), tuple(2.0 ** round(math.log2(value / qmax)) for value in ranges))


def adapt(grid: Grid, layout: Layout, mean_delta: Vector, n_saturated: int, n_values: int, qmax: int) -> Grid:
    """The next version's grid: ``grid`` itself unless it is clearly too fine or too coarse.

    Args:
        grid: on which the deltas were quantised.
        layout: of the model.
        mean_delta: float32[n_parameters], the decrypted weighted mean.
        n_saturated: values that were clipped, all sites together.
        n_values: values that were sent, all sites together.
        qmax: largest magnitude of a quantised value.
    """
    saturation = n_saturated / max(n_values, 1)
    fill = layout.means(mean_delta, np.abs) / (np.array(grid.steps) * qmax)
    factors = [_factor(float(value), saturation, float(fill.max(initial=0.0)), qmax) for value in fill]
    steps = tuple(max(step * factor, min(step, MIN_STEP)) for step, factor in zip(grid.steps, factors, strict=True))
    return grid if steps == grid.steps else _grid(grid.grid_id.partition("-")[0], steps)


def _factor(fill: float, saturation: float, fullest: float, qmax: int) -> float:
    """What a step is multiplied by, given its tensor's mean magnitude over range and the share clipped overall.

    >>> _factor(0.02, saturation=0.0, fullest=0.02, qmax=127), _factor(0.2, saturation=0.2, fullest=0.3, qmax=127)
    (1.0, 4.0)
    >>> _factor(0.001, saturation=0.0, fullest=0.2, qmax=127)
    0.03125
    """
    if saturation > SATURATION_HIGH and fill >= fullest / 2:
        if fill < COARSE[qmax] / 4:
            return 1.0  # so small a mean of values of which many are clipped is not to be: somebody claims what is not
        return next(factor for share, factor in _GROW if saturation > share)
    if fill > FULL:
        return 2.0
    # while something is clipped it may be this tensor, spread over sites that disagree: be sure before shrinking
    coarse = COARSE[qmax] / (1 if saturation < SATURATION_LOW else 4)
    if 0 < fill < coarse:
        return max(2.0 ** -math.floor(math.log2(4 * COARSE[qmax] / fill)), _MAX_SHRINK)
    return 1.0


def _grid(run: str, steps: tuple[float, ...]) -> Grid:
    digest = hashlib.blake2b(struct.pack(f"<{len(steps)}d", *steps), digest_size=16).hexdigest()
    return Grid(grid_id=f"{run}-{digest}", steps=steps)
