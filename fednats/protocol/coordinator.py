"""The coordinator's machine: a `Collector` over regions, and the life of the run around it."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

from fednats.config import DefenceSettings, StopSettings
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import (
    AwaitFinalEvaluation,
    CloseRun,
    Combination,
    Combined,
    Command,
    Configured,
    EvaluationsSummed,
    Event,
    EverySiteFails,
    FinalEvaluationOverdue,
    KeepBest,
    RunClosed,
    VersionAnnounced,
    WallTimeReached,
    contribution_id,
)
from fednats.protocol.outliers import NormHistory

FINAL_EVALUATION_S = 30.0
"""How long the run stays open for the evaluations of its last version."""

USUAL_METRIC = "auc"
"""Chooses the best version where the run does not say what does, and there is one."""

COVERAGE_VERSIONS = 10
"""An evaluation over fewer sites than one of this many before it does not count for the best version or the target."""


class RunState(Enum):
    """Where the run stands."""

    OPEN = auto()
    FINISHING = auto()
    """No version follows; the evaluations of the last one are awaited."""
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class Evaluated:
    """Metrics of one version over all the sites that reported on it."""

    version: int
    n_sites: int
    n_samples: int
    metrics: dict[str, float]
    means: tuple[str, ...]
    """Those of ``metrics`` that are means over hospitals, weighted by cases; the others are of all cases pooled."""


class Coordinator:
    """Collect from regions, count versions, keep the best, end the run by the first stop rule that holds."""

    def __init__(self, run: str) -> None:
        self.collector = Collector(
            Roster(run=run, region=None, sites=frozenset(), regions=frozenset()),
            lambda event: event.settings.region_goal,
        )
        self.state = RunState.OPEN
        self.evaluated: dict[int, Evaluated] = {}
        self.best: Evaluated | None = None
        self.reached_target_at: int | None = None
        """First version whose target metric reached the target."""
        self.reason = ""
        self.target_metric: str | None = None
        """By which the best version is chosen; None before the first evaluation."""
        self.failed = False
        """Whether the run was closed because it cannot do what it was asked to."""
        self.norms = NormHistory(DefenceSettings())
        self._stop = StopSettings()

    @property
    def version(self) -> int:
        """The current model version; -1 before the first."""
        return -1 if self.collector.current is None else self.collector.current.version

    @property
    def in_flight(self) -> Combination | None:
        """The combination that makes the next version, if one is under way."""
        return self.collector.in_flight

    @property
    def n_buffered(self) -> int:
        """Sums taken in and not yet combined."""
        return self.collector.n_buffered

    def handle(self, event: Event) -> list[Command]:
        """Take in what happened, return what is to be done."""
        if isinstance(event, Configured) and event.stop is not None:
            self._stop = event.stop
        if isinstance(event, Configured) and event.defence is not None:
            self.norms.configure(event.defence)
        if isinstance(event, Combined):
            self._note_norms(event)
        if isinstance(event, WallTimeReached):
            return self._finish("max_wall_s reached")
        if isinstance(event, FinalEvaluationOverdue):
            return self._close()
        if isinstance(event, EverySiteFails):
            return self._give_up(f"every site fails: {event.why}")
        commands = self.collector.handle(event)
        if isinstance(event, EvaluationsSummed) and event.n_sites:
            commands += self._record(event)
        if isinstance(event, VersionAnnounced) and self.version >= self._stop.max_versions:
            commands += self._finish("max_versions reached")
        return commands

    def outliers(self, combination: Combination, norms: Mapping[str, float]) -> dict[str, str]:
        """Return which sums of ``combination`` must be left out, each with the reason in words; changes nothing.

        The daemon asks, leaves them out, and says so in `Combined`; a replay goes by what was said.

        Args:
            combination: under way.
            norms: L2 norm of each of its decrypted sums, by id.
        """
        return self.norms.outliers(
            {
                contribution_id(part.head): (part.head.region, norms[contribution_id(part.head)])
                for part in combination.parts
                if contribution_id(part.head) in norms
            }
        )

    def outstanding(self) -> list[Command]:
        """Return what a restarted daemon has to do before it goes on."""
        commands = self.collector.outstanding()
        if self.best is not None:
            commands.append(KeepBest(self.best.version))
        if self.state is RunState.FINISHING:
            commands.append(AwaitFinalEvaluation(FINAL_EVALUATION_S))
        if self.state is RunState.CLOSED:
            commands.append(CloseRun(self.version, self.reason))
        return commands

    def _note_norms(self, event: Combined) -> None:
        """Let the norms of what was applied count for what comes."""
        combination = self.in_flight
        for part in () if combination is None else combination.parts:
            identity = contribution_id(part.head)
            if identity in event.norms and identity not in event.quarantined:
                self.norms.add(part.head.region, event.norms[identity])

    def _record(self, summed: EvaluationsSummed) -> list[Command]:
        evaluated = Evaluated(summed.version, summed.n_sites, summed.n_samples, summed.metrics, summed.means)
        self.evaluated[summed.version] = evaluated
        if self.target_metric is None and (unknown := self._choose_target((*summed.metrics, *summed.undefined))):
            self.failed = True
            return [*self._finish(unknown), *self._close()]
        commands = self._compare(evaluated)
        if self.state is RunState.FINISHING and self.version in self.evaluated:
            commands += self._close()
        return commands

    def _choose_target(self, figures: tuple[str, ...]) -> str:
        """Take the metric that the run is set to, or else the usual one; return why that cannot be."""
        asked = self._stop.target_metric
        if not figures:
            return ""
        if asked is not None and asked not in figures:
            return f"stop.target_metric is {asked!r}, and no evaluation has it; set it to one of: {', '.join(figures)}"
        self.target_metric = asked or (USUAL_METRIC if USUAL_METRIC in figures else figures[0])
        return ""

    def _compare(self, evaluated: Evaluated) -> list[Command]:
        """Note whether a version is the best so far, or reaches the target."""
        metric, recent = self.target_metric, list(self.evaluated.values())[-COVERAGE_VERSIONS:]
        value = None if metric is None else evaluated.metrics.get(metric)
        if metric is None or value is None or evaluated.n_sites < max(other.n_sites for other in recent):
            return []
        commands: list[Command] = []
        if self.best is None or self._stop.better(metric, value, self.best.metrics[metric]):
            self.best = evaluated
            commands.append(KeepBest(evaluated.version))
        if self._stop.reached(metric, value) and self.reached_target_at is None:
            self.reached_target_at = evaluated.version
            if self._stop.stop_at_target:
                commands += self._finish("target reached")
        return commands

    def _finish(self, reason: str) -> list[Command]:
        if self.state is not RunState.OPEN:
            return []
        self.state = RunState.FINISHING
        self.reason = reason
        commands = self.collector.handle(RunClosed(reason=reason))
        if self.version in self.evaluated:
            return commands + self._close()
        return [*commands, AwaitFinalEvaluation(FINAL_EVALUATION_S)]

    def _give_up(self, reason: str) -> list[Command]:
        """End the run as failed, at once: nobody waits for evaluations of a model that came to nothing."""
        if self.state is not RunState.OPEN:
            return []
        self.failed = True
        commands = self._finish(reason)
        return [command for command in commands if not isinstance(command, AwaitFinalEvaluation)] + self._close()

    def _close(self) -> list[Command]:
        if self.state is not RunState.FINISHING:
            return []
        self.state = RunState.CLOSED
        return [CloseRun(self.version, self.reason)]
