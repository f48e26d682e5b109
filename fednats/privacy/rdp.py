"""Rényi differential privacy: what mechanisms cost, and how costs add up and convert to (epsilon, delta).

A cost is a vector over `ORDERS`, float64[n_orders]. Costs of mechanisms that run one after the other add up, even when
each is chosen from the results before it (Mironov 2017, arXiv:1702.07476, proposition 1).
"""

import math
import warnings
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

Rdp = NDArray[np.float64]

ORDERS: tuple[float, ...] = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *(float(order) for order in (*range(11, 65), *range(72, 129, 8), 160, 192, 256, 320, 384, 448, 512)),
)
"""Orders alpha at which costs are kept; epsilon is the smallest over them."""


def nothing() -> Rdp:
    """Return the cost of no release at all."""
    return np.zeros(len(ORDERS))


@lru_cache(maxsize=256)
def sampled_gaussian(noise_multiplier: float, sample_rate: float) -> Rdp:
    """Return the cost of one step of DP-SGD; neighbouring data sets differ by adding or removing one record.

    Args:
        noise_multiplier: standard deviation of the noise over the L2 norm to which each record's gradient is clipped.
        sample_rate: probability that a record is in the step's batch, independently of others (Poisson sampling).

    Computed by opacus, after Mironov, Talwar and Zhang 2019 (arXiv:1908.10530), section 3.3.

    >>> steps = 60 * 60000 // 256  # 60 epochs of MNIST in batches of 256 on average, noise 1.1
    >>> round(epsilon(steps * sampled_gaussian(1.1, 256 / 60000), delta=1e-5), 2)
    2.6
    """
    if noise_multiplier == 0:
        return np.full(len(ORDERS), np.inf)
    return np.asarray(compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=1, orders=list(ORDERS)))


@lru_cache(maxsize=256)
def skellam(noise_multiplier: float, variance: float) -> Rdp:
    """Return the cost of releasing one integer vector with Skellam noise on every value.

    Value i is on a grid of step s_i. Its noise has variance (z * c / s_i)^2 in squared steps, where z is
    ``noise_multiplier`` and c bounds the L2 distance of neighbouring vectors, in units of the model. ``variance`` is
    the smallest of these variances.

    Agarwal, Kairouz and Liu 2021 (arXiv:2110.04995), corollary 3.6, is for one variance: a value that differs by the
    integer d costs at most alpha d^2 / (2 v) + min(((2 alpha - 1) d^2 + 6 |d|) / (4 v^2), 3 |d| / (2 v)). Values are
    independent, so costs add; with |d| <= d^2 and v >= ``variance`` the sum is at most

        alpha / (2 z^2) + min((2 alpha + 5) / (4 z^2 v), 3 / (2 z^2))

    The corollary holds for whole orders. Cost rises with the order, so other orders take the cost of the next one.

    >>> gaussian = np.array(ORDERS) / 2
    >>> bool((skellam(1.0, 1e6) >= gaussian).all()), round(float(skellam(1.0, 1e6)[-1] / gaussian[-1]), 4)
    (True, 1.0)
    """
    alpha = np.ceil(ORDERS)
    square = noise_multiplier**2
    return alpha / (2 * square) + np.minimum((2 * alpha + 5) / (4 * square * variance), 3 / (2 * square))


def epsilon(cost: Rdp, delta: float) -> float:
    """Return the smallest epsilon with which ``cost`` implies (epsilon, ``delta``)-privacy; infinite without noise.

    The conversion is theorem 21 of Balle et al. 2020 (arXiv:1905.09982), as implemented in opacus.

    >>> epsilon(nothing(), delta=1e-5), epsilon(nothing() + np.inf, delta=1e-5)
    (0.0, inf)
    """
    if not cost.any():
        return 0.0
    if not np.isfinite(cost).any():
        return math.inf
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a best order at either end, where the bound still holds
        found, _ = get_privacy_spent(orders=list(ORDERS), rdp=cost, delta=delta)
    return max(0.0, float(found))
