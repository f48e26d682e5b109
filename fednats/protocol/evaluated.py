"""Evaluated versions, and which of them can be compared: only figures over the same hospitals and test cases."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

COVERAGE_VERSIONS = 10
"""The best version, or the first to reach the target, covers the most hospitals of the last evaluations: this many."""

ALIKE = 0.1
"""How far a number of test cases may be from the usual one, as a fraction of it."""


class Population(NamedTuple):
    """The sites and test cases that figures cover."""

    n_sites: int
    n_samples: int
    """Test cases."""


@dataclass(frozen=True, slots=True)
class EvaluatedVersion:
    """Metrics of one version over all the sites that reported on it."""

    version: int
    n_sites: int
    n_samples: int
    metrics: dict[str, float]
    means: tuple[str, ...]
    """The ``metrics`` that are means over hospitals, weighted by cases; the others are computed on all cases pooled."""

    def is_of(self, population: Population) -> bool:
        """Whether these figures cover as many sites and about as many cases as ``population``."""
        difference = abs(self.n_samples - population.n_samples)
        return self.n_sites == population.n_sites and difference <= ALIKE * population.n_samples


def usual_population(evaluated: Iterable[EvaluatedVersion]) -> Population:
    """Return the population that comparable figures cover: the most sites, and the usual number of cases with them.

    The usual number is the median, so one odd count makes no difference.

    >>> recent = [EvaluatedVersion(v, 5, n, {}, ()) for v, n in enumerate([150, 150, 33552])]
    >>> usual_population([*recent, EvaluatedVersion(3, 2, 62, {}, ())])
    Population(n_sites=5, n_samples=150)
    """
    recent = list(evaluated)[-COVERAGE_VERSIONS:]
    most = max(each.n_sites for each in recent)
    return Population(most, statistics.median_low(each.n_samples for each in recent if each.n_sites == most))
