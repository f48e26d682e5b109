"""A task's figures as sums that hospitals can add up: a numerator and a denominator for each, in fixed point.

The sum of numerators over the sum of denominators is the figure over all hospitals. The numerator is a hospital's
figure times its cases, the denominator its cases, so the result is the mean weighted by cases. A figure that a
hospital's cases do not allow adds nothing to either.

A figure's name decides its cell, so hospitals need not have the same figures or know each other's. If two names of a
task fall into one cell, another *arrangement* keeps them apart.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from fednats.errors import LocalDataError, Reason, RefusedError
from fednats.learning.scores import n_counts
from fednats.messages import MAX_COUNT, MAX_FIGURES, MAX_METRIC

N_CELLS = 448
"""Chosen so that two classes' counts and the figures fill one ciphertext of the usual size."""

FRACTION_BITS = 32
"""Numerators are multiples of 2^-32."""

NUMERATOR_BITS = 126
DENOMINATOR_BITS = 40
MAX_ARRANGEMENT = 2**16


@dataclass(frozen=True)
class Share:
    """The hospitals' joint contribution to a figure."""

    numerator: float
    denominator: float
    n_sites: int
    """Hospitals whose cases allow the figure."""

    @property
    def value(self) -> float:
        """Value of the figure."""
        return self.numerator / self.denominator

    def __add__(self, other: "Share") -> "Share":
        """Add the contributions of different hospitals."""
        return Share(
            self.numerator + other.numerator, self.denominator + other.denominator, self.n_sites + other.n_sites
        )


@lru_cache(maxsize=16)
def arrangement_of(names: tuple[str, ...]) -> int:
    """Return the first arrangement in which no two of ``names`` share a cell.

    Raises:
        LocalDataError: there are too many names.
    """
    if len(names) > MAX_FIGURES:
        raise LocalDataError(f"metrics() gives {len(names)} figures, at most {MAX_FIGURES} can be summed; give fewer")
    return next(tried for tried in range(MAX_ARRANGEMENT) if len(cells(names, tried)) == len(names))


def cells(names: Iterable[str], arrangement: int) -> dict[int, str]:
    """Return the names by cell; if several names share a cell, the first."""
    found: dict[int, str] = {}
    for name in names:
        digest = blake2b(f"{arrangement}/{name}".encode(), digest_size=8).digest()
        found.setdefault(int.from_bytes(digest, "big") % N_CELLS, name)
    return found


def known_names(named: Sequence[Collection[str]], arrangement: int) -> tuple[str, ...]:
    """Return the figures of a sum, from the names that each part gives; each must have a cell to itself.

    If names share a cell, the one that more parts give is kept, so nobody can push another's figure out. The order is
    that of the task.
    """
    order = {name: None for names in named for name in names}
    by_claims = sorted(order, key=lambda name: -sum(name in names for names in named))
    kept = set(list(cells(by_claims, arrangement).values())[:MAX_FIGURES])
    return tuple(name for name in order if name in kept)


def n_integers(n_classes: int, arrangement: int | None, bits: int) -> int:
    """Return the number of integers in an evaluation: class counts, then figures if there is an arrangement.

    >>> n_integers(2, None, 15), n_integers(2, 0, 15)
    (2292, 8129)
    """
    figures = 0 if arrangement is None else (N_CELLS + 1) * _width(bits)
    return n_counts(n_classes) + figures


def flat_figures(figures: Mapping[str, float], n_cases: int, arrangement: int, bits: int) -> NDArray[np.int64]:
    """Encode a hospital's ``figures``, each weighted by its ``n_cases``, as int64[n]; row 0 has the number of cases.

    Integers have magnitudes of at most ``bits`` bits.

    Raises:
        LocalDataError: a figure is not finite, or too large.
    """
    table = np.zeros((N_CELLS + 1, _width(bits)), np.int64)
    table[0] = _row(0, n_cases, bits)
    for cell, name in cells(figures, arrangement).items():
        value = figures[name]
        if not abs(value) <= MAX_METRIC:
            raise LocalDataError(f"metric {name} is {value}; at most {MAX_METRIC:g} can be summed")
        table[cell + 1] = _row(round(value * 2**FRACTION_BITS) * n_cases, n_cases, bits)
    return table.ravel()


def read_figures(
    flat: NDArray[np.int64], names: Iterable[str], arrangement: int, bits: int, n_sites: int
) -> tuple[int, dict[str, Share]]:
    """Return the number of cases in a sum, and the share of each of ``names`` that any hospital has.

    Shares whose numbers are impossible are left out.

    Raises:
        RefusedError: ``malformed``: ``n_sites`` sites cannot have that number of cases.
    """
    table = flat.reshape(N_CELLS + 1, _width(bits))
    _, n_cases, _ = _numbers(table[0], bits)
    if not 0 <= n_cases <= MAX_COUNT * n_sites:
        raise RefusedError(Reason.MALFORMED, f"{n_cases} test cases of {n_sites} sites")
    found = {}
    for cell, name in cells(names, arrangement).items():
        numerator, denominator, n = _numbers(table[cell + 1], bits)
        share = Share(math.ldexp(numerator, -FRACTION_BITS), denominator, n)
        if 0 < denominator <= n_cases and 1 <= n <= n_sites and abs(share.value) <= MAX_METRIC:
            found[name] = share
    return n_cases, found


def _width(bits: int) -> int:
    return -(-NUMERATOR_BITS // bits) + -(-DENOMINATOR_BITS // bits) + 1


def _row(numerator: int, denominator: int, bits: int) -> list[int]:
    """Write both numbers in digits of ``bits`` bits, each with the number's sign, then a 1 for the site."""
    return [*_digits(numerator, NUMERATOR_BITS, bits), *_digits(denominator, DENOMINATOR_BITS, bits), 1]


def _numbers(row: NDArray[np.int64], bits: int) -> tuple[int, int, int]:
    numerator = row[: -(-NUMERATOR_BITS // bits)]
    denominator = row[len(numerator) : -1]
    return _number(numerator, bits), _number(denominator, bits), int(row[-1])


def _digits(number: int, total_bits: int, bits: int) -> list[int]:
    magnitude, sign = abs(number), -1 if number < 0 else 1
    return [sign * (magnitude >> place & (1 << bits) - 1) for place in range(0, total_bits, bits)]


def _number(digits: NDArray[np.int64], bits: int) -> int:
    return sum(int(digit) << (bits * place) for place, digit in enumerate(digits))
