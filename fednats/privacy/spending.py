"""What a site reports of its privacy account. Imports no torch, because the daemon reads it."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LevelSpent:
    """What was spent at one level (single records, or the whole site), over all runs."""

    epsilon: float
    delta: float
    last_epsilon: float | None
    """Epsilon of the last charge alone; None if nothing was charged since the worker started."""
    n_passes: int

    def describe(self) -> dict[str, Any]:
        """Return it for JSON; an infinite epsilon becomes None."""
        return {
            "epsilon": _finite(self.epsilon),
            "delta": self.delta,
            "last_epsilon": _finite(self.last_epsilon),
            "n_passes": self.n_passes,
        }


@dataclass(frozen=True)
class Spending:
    """Everything spent on a site's data, and its budget."""

    record: LevelSpent
    site: LevelSpent | None
    """None in a run without noise on whole deltas."""
    max_epsilon: float | None
    n_unseen: int = 0
    """This site's updates in this federation that were charged after the account was restored from a backup."""

    @property
    def epsilon(self) -> float | None:
        """Epsilon spent for any one record; None if it is infinite."""
        return _finite(self.record.epsilon)

    def describe(self, *, spent: bool) -> dict[str, Any]:
        """Return the ``privacy`` section of ``/status``; ``spent``: whether the next pass would exceed the budget."""
        return {
            "record": self.record.describe(),
            "site": None if self.site is None else self.site.describe(),
            "max_epsilon": self.max_epsilon,
            "n_unseen": self.n_unseen,
            "spent": spent,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
