"""Versions that were evaluated, and which of them may be compared: only figures over the same hospitals' test cases."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

COVERAGE_VERSIONS = 10
"""Among so many versions that were evaluated last, those of the most hospitals can be the best or reach the target."""

ALIKE = 0.1
"""So far, as a part of it, a number of test cases may be from the usual one."""


class Population(NamedTuple):
    """Who and what figures are of."""

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
    """Those of ``metrics`` that are means over hospitals, weighted by cases; the others are of all cases pooled."""

    def is_of(self, population: Population) -> bool:
        """Whether these figures are of such hospitals and cases."""
        difference = abs(self.n_samples - population.n_samples)
        return self.n_sites == population.n_sites and difference <= ALIKE * population.n_samples


def usual_population(evaluated: Iterable[EvaluatedVersion]) -> Population:
    """Return what figures must be of to be compared: the most hospitals, and the number of cases that is usual with them.

    The median: one odd number of cases makes no difference.

    >>> recent = [EvaluatedVersion(v, 5, n, {}, ()) for v, n in enumerate([150, 150, 33552])]
    >>> usual_population([*recent, EvaluatedVersion(3, 2, 62, {}, ())])
    Population(n_sites=5, n_samples=150)
    """
    recent = list(evaluated)[-COVERAGE_VERSIONS:]
    most = max(each.n_sites for each in recent)
    return Population(most, statistics.median_low(each.n_samples for each in recent if each.n_sites == most))
