"""How much an update counts that was trained on an older model version.

Staleness is the number of versions published since the one an update was trained on; 0 is fresh. The functions are
those of Xie et al. 2019, "Asynchronous Federated Optimization" (arXiv:1903.03934, section 5.2).
"""

from collections.abc import Callable
from typing import Literal

from fednats.config import StalenessSettings

SMALLEST = 1e-6
"""Lower bound of a factor, whatever the settings: a factor of 0 would lead to divisions by 0."""

StalenessFunction = Literal["constant", "polynomial", "hinge"]


def constant(_staleness: int, _settings: StalenessSettings) -> float:
    """Weigh every update alike."""
    return 1.0


def polynomial(staleness: int, settings: StalenessSettings) -> float:
    """Return ``(1 + staleness) ** -exponent``.

    >>> polynomial(3, StalenessSettings(exponent=0.5))
    0.5
    """
    return float((1 + staleness) ** -settings.exponent)


def hinge(staleness: int, settings: StalenessSettings) -> float:
    """Return 1 up to ``hinge_at``, then ``1 / (1 + exponent * (staleness - hinge_at))``.

    >>> hinge(4, StalenessSettings(hinge_at=4)), hinge(6, StalenessSettings(hinge_at=4, exponent=0.5))
    (1.0, 0.5)
    """
    return 1.0 / (1.0 + settings.exponent * max(0, staleness - settings.hinge_at))


FUNCTIONS: dict[StalenessFunction, Callable[[int, StalenessSettings], float]] = {
    "constant": constant,
    "polynomial": polynomial,
    "hinge": hinge,
}


def factor(staleness: int, settings: StalenessSettings) -> float:
    """Return the factor on an update's weight, from `SMALLEST` to 1; 1 for a fresh one."""
    return max(FUNCTIONS[settings.function](max(0, staleness), settings), SMALLEST)


def too_stale(staleness: int, settings: StalenessSettings) -> bool:
    """Whether an update is past the cut-off and must be refused."""
    return staleness > settings.max_staleness
