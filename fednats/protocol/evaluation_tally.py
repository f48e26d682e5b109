"""Collects evaluations of one version until they can be summed over enough sites to hide each site's own figures."""

from collections.abc import Collection
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from fednats.errors import Reason, RefusedError
from fednats.messages import Evaluation, EvaluationBlocks, EvaluationSum
from fednats.protocol.cohorts import Cohorts
from fednats.protocol.events import SumEvaluations, evaluated_by, evaluation_id

PATIENCE_VERSIONS = 5
"""After this many newer versions have been evaluated, a version is summed with the evaluations that have arrived."""

MAX_CHANGE = 2
"""Largest factor by which a site's number of test cases may differ from the registered one, up or down."""

FORGOTTEN_VERSIONS = 20
"""After this many newer versions, a version is closed: it is summed if that is possible, and given up otherwise."""

EvaluationPart = Evaluation | EvaluationSum


@dataclass(frozen=True, slots=True)
class ClosedTally:
    """The outcome for one version: some evaluations are summed, or none; the others are given up."""

    version: int
    summing: SumEvaluations | None
    given_up: tuple[str, ...]


class EvaluationTally:
    """Collect evaluations by version; close each version once.

    `Cohorts` decides which sites may be summed. A version is closed when one of these holds:

    - every source has reported;
    - the sum has at least ``min_sites`` sites, everybody present has reported, and no block is made or split;
    - the sum has at least ``min_sites`` sites, and the version is `PATIENCE_VERSIONS` behind the newest evaluated one;
    - the version is `FORGOTTEN_VERSIONS` behind.

    If the sum then has fewer than ``min_sites`` sites, the version's evaluations are given up. A site's first
    evaluation of a run registers its number of test cases.
    """

    def __init__(self, sources: AbstractSet[str]) -> None:
        self.expect(sources, sources)
        self._open: dict[int, dict[str, EvaluationPart]] = {}
        self._cohorts = Cohorts()
        self._newest = 0
        self._done_below = 0
        self._done: set[int] = set()
        self._registered: dict[str, int] = {}

    def expect(self, sources: AbstractSet[str], present: AbstractSet[str]) -> None:
        """Continue with other sources; ``present`` are those present now."""
        self._sources = frozenset(sources)
        self._present = frozenset(present)

    def is_closed(self, version: int) -> bool:
        """Whether ``version`` was given out or given up."""
        return version not in self._open and (version < self._done_below or version in self._done)

    def check_cases(self, evaluation: Evaluation) -> None:
        """Compare the number of test cases with the one that the site registered; register it if it is the first.

        Raises:
            RefusedError: ``test_cases``: there are more than twice, or less than half as many.
        """
        registered = self._registered.setdefault(evaluation.site, evaluation.n_samples)
        if not registered / MAX_CHANGE <= evaluation.n_samples <= registered * MAX_CHANGE:
            raise RefusedError(
                Reason.TEST_CASES,
                f"{evaluation.site} evaluates on {evaluation.n_samples} test cases and began the run with {registered};"
                " give it the same test data again, or start another run",
            )

    def has(self, evaluation: EvaluationPart) -> bool:
        """Whether this very evaluation is waiting here."""
        return self._open.get(evaluation.version, {}).get(evaluated_by(evaluation)) == evaluation

    def give_up(self, below: int) -> list[str]:
        """Give up all versions before ``below``, the first of a run; return the ids of their evaluations."""
        self._registered.clear()
        given_up = [version for version in self._open if version < below]
        return [evaluation_id(part) for version in given_up for part in self._open.pop(version).values()]

    def add(self, evaluation: EvaluationPart, min_sites: int) -> list[ClosedTally]:
        """Count ``evaluation``, whose version must be open; return the versions that can now be closed."""
        self._newest = max(self._newest, evaluation.version)
        self._open.setdefault(evaluation.version, {})[evaluated_by(evaluation)] = evaluation
        return self.complete(min_sites)

    def again(self, version: int, parts: Collection[EvaluationPart], min_sites: int) -> list[ClosedTally]:
        """Take ``parts`` in again after others spoilt their sum; return the versions that can now be closed."""
        if parts:
            self._open[version] = {evaluated_by(part): part for part in parts}
        return self.complete(min_sites)

    def complete(self, min_sites: int) -> list[ClosedTally]:
        """Close and return all versions that are ready."""
        closed = (self._close(version, min_sites) for version in sorted(self._open))
        return [each for each in closed if each is not None]

    @property
    def blocks(self) -> tuple[tuple[frozenset[str], ...], dict[str, int]]:
        """The blocks of `Cohorts`, and the smallest sum that each site accepts, in sites."""
        return self._cohorts.blocks, self._cohorts.asked

    def forget(self, closed_up_to: int | None) -> None:
        """Drop all evaluations here; versions up to ``closed_up_to`` are closed for good."""
        self._open.clear()
        if closed_up_to is not None:
            self._newest = max(self._newest, closed_up_to)
            self._done_below = max(self._done_below, closed_up_to + 1)
            self._done = {version for version in self._done if version >= self._done_below}

    def restore_blocks(self, noted: EvaluationBlocks) -> None:
        """Continue from blocks noted on the bus."""
        self._cohorts = Cohorts(map(frozenset, noted.blocks), dict(noted.asked))

    def _close(self, version: int, min_sites: int) -> ClosedTally | None:
        """Close ``version``; return None if it should wait for further evaluations."""
        reported, n_behind = self._open[version], self._newest - version
        sites = {source: part for source, part in reported.items() if isinstance(part, Evaluation)}
        asked = {source: max(min_sites, part.min_sites) for source, part in sites.items()}
        cohort = self._cohorts.largest(asked)
        summed = frozenset[str]().union(*cohort) | (reported.keys() - sites.keys())
        parts = tuple(reported[source] for source in sorted(summed))
        enough = _n_sites(parts) >= min_sites
        everybody = self._sources <= reported.keys()
        nothing_new = self._present <= reported.keys() and set(cohort) <= set(self._cohorts.blocks)
        if not (everybody or n_behind >= FORGOTTEN_VERSIONS) and not (
            enough and (nothing_new or n_behind >= PATIENCE_VERSIONS)
        ):
            return None
        del self._open[version]
        self._finish(version)
        if not enough:
            return ClosedTally(version, None, tuple(map(evaluation_id, reported.values())))
        self._cohorts.give_out(cohort, asked)
        left_out = tuple(evaluation_id(part) for part in reported.values() if part not in parts)
        return ClosedTally(version, SumEvaluations(version, parts), left_out)

    def _finish(self, version: int) -> None:
        self._done.add(version)
        while self._done_below in self._done:
            self._done.discard(self._done_below)
            self._done_below += 1


def _n_sites(parts: Collection[EvaluationPart]) -> int:
    return sum(1 if isinstance(part, Evaluation) else part.n_sites for part in parts)
