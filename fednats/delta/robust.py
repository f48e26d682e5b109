"""Robust sums: a few bad updates cannot move them far. They need readable updates, so ``cipher = "none"`` only.

Median and trimmed mean by coordinate follow Yin et al. 2018, "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates" (arXiv:1803.01498). Norm bounding follows Sun et al. 2019, "Can You Really Backdoor Federated
Learning?" (arXiv:1911.07963), with the median norm of the same sum as the bound instead of a fixed one.

The result is a sum like any other: integers that the coordinator divides by the total weight. The exact result times
the total weight is rounded to the nearest integer (halves to even), so the mean is off by at most half a step over the
total weight.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fednats.config import AggregationSettings

Integers = NDArray[np.int32]
Sum = NDArray[np.int64]


def median(values: Integers, total_weight: int) -> Sum:
    """Return each coordinate's median times ``total_weight``, int64[n], for int32[n_updates, n]. Weights do not matter.

    >>> median(np.int32([[1, 0], [2, 0], [100, -100]]), 10).tolist()
    [20, 0]
    """
    return _rounded(np.median(values, axis=0) * total_weight)


def trimmed_mean(values: Integers, total_weight: int, trim: float) -> Sum:
    """Average each coordinate without its ``floor(trim * n_updates)`` largest and smallest, times ``total_weight``.

    >>> trimmed_mean(np.int32([[1], [2], [3], [4], [1000]]), 10, trim=0.2).tolist()
    [30]
    """
    cut = int(trim * len(values))
    return _rounded(np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0) * total_weight)


def bounded_sum(values: Integers, weights: Sequence[int], factors: Sequence[float]) -> Sum:
    """Return the weighted sum of updates, each scaled by its factor, int64[n]."""
    return _rounded(np.asarray(weights) * np.asarray(factors) @ values)


def bound_norms(norms: Sequence[float]) -> tuple[float, ...]:
    """Return each update's factor: 1, or, for a norm above the median norm, the one that reduces it to the median.

    >>> bound_norms([1.0, 2.0, 20.0])
    (1.0, 1.0, 0.1)
    """
    bound = float(np.median(norms))
    return tuple(1.0 if norm <= bound else bound / norm for norm in norms)


def robust_sum(
    values: Integers, weights: Sequence[int], settings: AggregationSettings, factors: Sequence[float]
) -> Sum:
    """Sum int32[n_updates, n] by the rule in ``settings``; ``factors`` are for ``norm_bound``."""
    if settings.robust == "median":
        return median(values, sum(weights))
    if settings.robust == "trimmed_mean":
        return trimmed_mean(values, sum(weights), settings.trim)
    return bounded_sum(values, weights, factors)


def _rounded(exact: NDArray[np.float64]) -> Sum:
    integers: Sum = np.rint(exact).astype(np.int64)
    return integers
