"""What a site may say of its privacy account; apart from what loads torch, because the daemon reads it."""

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LevelSpent:
    """What was spent at one level (each record, or the whole site), over all runs."""

    epsilon: float
    delta: float
    last_epsilon: float | None
    """Of the last pass by itself; none since the worker started."""
    n_passes: int

    def describe(self) -> dict[str, Any]:
        """Return it as JSON has it: an epsilon without bound is null."""
        return {
            "epsilon": _finite(self.epsilon),
            "delta": self.delta,
            "last_epsilon": _finite(self.last_epsilon),
            "n_passes": self.n_passes,
        }


@dataclass(frozen=True)
class Spending:
    """A site's whole account, and its limit."""

    record: LevelSpent
    site: LevelSpent | None
    """None in a run without noise on whole deltas."""
    max_epsilon: float | None
    n_unseen: int = 0
    """Updates of this site in this run that were charged after the account was put back from a backup."""

    @property
    def epsilon(self) -> float | None:
        """What was spent of the privacy of any one record; None if that has no bound."""
        return _finite(self.record.epsilon)

    def describe(self, *, spent: bool) -> dict[str, Any]:
        """Return what ``/status`` shows under ``privacy``; ``spent``: the next pass would go beyond the budget."""
        return {
            "record": self.record.describe(),
            "site": None if self.site is None else self.site.describe(),
            "max_epsilon": self.max_epsilon,
            "n_unseen": self.n_unseen,
            "spent": spent,
        }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
