"""Integer weights for an encrypted sum, as close to the exact shares as the total allows."""

from collections.abc import Sequence

from fednats.errors import OverflowRefusedError

CANDIDATES = 64
"""Number of totals tried, from the largest downwards, to find the one that matches the shares best."""

MAX_STEPS = 2_000
"""Most contributions times candidates: with many contributions fewer totals are tried, to take milliseconds."""


def apportion(masses: Sequence[float], sizes: Sequence[int], total: int) -> tuple[int, ...]:
    """Give each of *k* contributions an integer weight, at least 1, so that ``weight * size`` follows ``mass``.

    ``sizes`` are the total weights that the contributions already carry (1 for a site's update, the total weight of
    the sum for a region's). ``sum(weight * size)`` never exceeds ``total``. Largest remainder (Hamilton): with sizes
    of 1 the share of each contribution is off by less than ``1 / total``.

    >>> apportion([100, 200, 300], [1, 1, 1], 12)
    (2, 4, 6)
    >>> apportion([300, 100], [100, 100], 500)
    (3, 1)
    >>> apportion([1000, 1], [1, 1], 10)
    (9, 1)

    Raises:
        OverflowRefusedError: weights of 1 already exceed ``total``.
    """
    if sum(sizes) > total:
        raise OverflowRefusedError(f"{len(sizes)} contributions of total weight {sum(sizes)} do not fit in {total}")
    n_candidates = max(1, min(CANDIDATES, MAX_STEPS // len(sizes)))
    totals = range(total, sum(sizes) - 1, -min(sizes))[:n_candidates]
    candidates = [_largest_remainder(masses, sizes, candidate) for candidate in totals]
    return min(candidates, key=lambda weights: _error(weights, masses, sizes))


def _largest_remainder(masses: Sequence[float], sizes: Sequence[int], total: int) -> tuple[int, ...]:
    scale = total / sum(masses)
    exact = [mass * scale / size for mass, size in zip(masses, sizes, strict=True)]
    weights = [max(1, int(value)) for value in exact]
    used = sum(weight * size for weight, size in zip(weights, sizes, strict=True))
    while used > total:  # weights raised to 1 took too much: reduce the one furthest above its share
        _, index = max((weights[i] / exact[i], i) for i in range(len(weights)) if weights[i] > 1)
        weights[index] -= 1
        used -= sizes[index]
    for index in sorted(range(len(weights)), key=lambda i: (weights[i] - exact[i], i)):
        if used + sizes[index] <= total and weights[index] < exact[index]:
            weights[index] += 1
            used += sizes[index]
    return tuple(weights)


def _error(weights: Sequence[int], masses: Sequence[float], sizes: Sequence[int]) -> float:
    """Return the largest difference between a contribution's share of the sum and its share of the mass."""
    carried = [weight * size for weight, size in zip(weights, sizes, strict=True)]
    return max(abs(weight / sum(carried) - mass / sum(masses)) for weight, mass in zip(carried, masses, strict=True))
