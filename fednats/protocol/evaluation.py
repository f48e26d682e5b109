"""Sum evaluations of one version over distinct sites, so that no site's own figures go on."""

from collections.abc import Mapping
from collections.abc import Set as AbstractSet

from fednats.messages import Evaluation, EvaluationSum
from fednats.protocol.events import SumEvaluations, evaluation_id

PATIENCE_VERSIONS = 5
"""A version whose evaluations are incomplete is summed as it is when this many newer ones have been evaluated."""

FORGOTTEN_VERSIONS = 20
"""So far behind, a version's evaluations are given up."""

Closed = tuple[SumEvaluations | None, tuple[str, ...]]
"""A version's evaluations to be summed, or None and the ids of what is given up."""


class EvaluationTally:
    """Collect evaluations by version; give each version out once.

    A version is given out when every source has reported; when at least ``min_sites`` sites have, and with them
    everybody who is present; or when so many have and it is `PATIENCE_VERSIONS` behind the newest evaluated one. One
    that is `FORGOTTEN_VERSIONS` behind is dropped.
    """

    def __init__(self, sources: AbstractSet[str]) -> None:
        self.expect(sources, sources)
        self._open: dict[int, dict[str, Evaluation | EvaluationSum]] = {}
        self._done_below = 0
        self._done: set[int] = set()

    def expect(self, sources: AbstractSet[str], present: AbstractSet[str]) -> None:
        """Go on with other sources, of whom ``present`` are there."""
        self._sources = frozenset(sources)
        self._present = frozenset(present)

    def add(self, evaluation: Evaluation | EvaluationSum, min_sites: int) -> list[Closed]:
        """Count ``evaluation``; return what that completes."""
        version = evaluation.version
        if version < self._done_below or version in self._done:
            return [(None, (evaluation_id(evaluation),))]
        source = evaluation.site if isinstance(evaluation, Evaluation) else evaluation.region
        self._open.setdefault(version, {})[source] = evaluation
        return self.complete(min_sites)

    def complete(self, min_sites: int) -> list[Closed]:
        """Return what is complete."""
        newest = max(self._open, default=0)
        return [
            self._close(version, min_sites)
            for version in sorted(self._open)
            if self._is_complete(version, newest, min_sites)
        ]

    def _is_complete(self, version: int, newest: int, min_sites: int) -> bool:
        reported = self._open[version]
        if self._sources <= reported.keys() or version <= newest - FORGOTTEN_VERSIONS:
            return True
        enough = _n_sites(reported) >= min_sites
        return enough and (self._present <= reported.keys() or version <= newest - PATIENCE_VERSIONS)

    def _close(self, version: int, min_sites: int) -> Closed:
        reported = self._open.pop(version)
        self._done.add(version)
        while self._done_below in self._done:
            self._done.discard(self._done_below)
            self._done_below += 1
        if _n_sites(reported) < min_sites:
            return (None, tuple(evaluation_id(evaluation) for evaluation in reported.values()))
        return (SumEvaluations(version, tuple(reported[source] for source in sorted(reported))), ())


def _n_sites(reported: Mapping[str, Evaluation | EvaluationSum]) -> int:
    return sum(1 if isinstance(evaluation, Evaluation) else evaluation.n_sites for evaluation in reported.values())
