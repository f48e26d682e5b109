"""A task's figures as sums that hospitals can add up: of each a numerator and a denominator, in fixed point.

The sum of the numerators over that of the denominators is the figure of all of them: with a hospital's figure times its
cases above and its cases below, the mean over hospitals weighted by cases. A figure that a hospital's cases do not allow
adds nothing to either.

Each figure has a cell, and its name says which: hospitals need not have the same figures, nor know of each other's. Two
names of a task that fall into one cell are kept apart by another *arrangement*.
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
"""So many that the counts of two classes and the figures are one ciphertext of the usual size."""

FRACTION_BITS = 32
"""Numerators are multiples of 2 to the minus this."""

NUMERATOR_BITS = 126
DENOMINATOR_BITS = 40
MAX_ARRANGEMENT = 2**16


@dataclass(frozen=True)
class Share:
    """What hospitals put into a figure together."""

    numerator: float
    denominator: float
    n_sites: int
    """Hospitals whose cases allow the figure."""

    @property
    def value(self) -> float:
        """The figure."""
        return self.numerator / self.denominator

    def __add__(self, other: "Share") -> "Share":
        """Put together what different hospitals put in."""
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
    """Return the names that have a cell, by cell; of several for one cell the first."""
    found: dict[int, str] = {}
    for name in names:
        digest = blake2b(f"{arrangement}/{name}".encode(), digest_size=8).digest()
        found.setdefault(int.from_bytes(digest, "big") % N_CELLS, name)
    return found


def known_names(named: Sequence[Collection[str]], arrangement: int) -> tuple[str, ...]:
    """Return the figures of a sum, given those that each part names: those with cells of their own.

    Names that more parts give come first, so that nobody can push another's out; otherwise they stay in the order of the
    task.
    """
    order = {name: None for names in named for name in names}
    by_claims = sorted(order, key=lambda name: -sum(name in names for names in named))
    kept = set(list(cells(by_claims, arrangement).values())[:MAX_FIGURES])
    return tuple(name for name in order if name in kept)


def n_integers(n_classes: int, arrangement: int | None, bits: int) -> int:
    """Return how many integers an evaluation is sent as: class counts, then figures if there is an arrangement of them.

    >>> n_integers(2, None, 15), n_integers(2, 0, 15)
    (2292, 8129)
    """
    figures = 0 if arrangement is None else (N_CELLS + 1) * _width(bits)
    return n_counts(n_classes) + figures


def flat_figures(figures: Mapping[str, float], n_cases: int, arrangement: int, bits: int) -> NDArray[np.int64]:
    """Write a hospital's ``figures``, each weighted by its ``n_cases``, as int64[n]; of a row the number of all cases is the first.

    ``bits``: of the magnitude of an integer.

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
    """Return the number of cases in a sum, and what was put into each of ``names`` that any hospital has.

    Raises:
        RefusedError: ``malformed``: the cases are not a number that so many sites can have.
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
    """Write both in digits of ``bits``, each with the number's sign, and a 1 for the site."""
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
