"""The coordinator's machine: a `Collector` over regions, and the life of the run around it."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto

from fednats.config import DefenceSettings, RunSettings, StopSettings
from fednats.messages import Composition, Opening, OpeningNote
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.evaluated import EvaluatedVersion, usual_population
from fednats.protocol.events import (
    AwaitFinalEvaluation,
    CloseRun,
    Combination,
    Combined,
    CombineFailed,
    Command,
    Configured,
    EvaluationsSummed,
    Event,
    EverySiteFails,
    FinalEvaluationOverdue,
    KeepBest,
    OpenRun,
    ReportBounded,
    Restored,
    RunClosed,
    RunFailed,
    RunOpened,
    VersionAnnounced,
    WallTimeReached,
    contribution_id,
)
from fednats.protocol.outliers import NormHistory

FINAL_EVALUATION_S = 30.0
"""How long the run stays open for the evaluations of its last version."""

USUAL_METRIC = "auc"
"""Metric that chooses the best version if the run names none and this one is available."""


class RunState(Enum):
    """The stage of the run."""

    OPEN = auto()
    FINISHING = auto()
    """No further version follows; the evaluations of the last one are awaited."""
    CLOSED = auto()


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run, open or past."""

    opening: Opening
    """The latest one, if the run was extended."""
    settings: RunSettings
    state: RunState
    last_version: int
    """Smaller than the run's first version while it has none."""
    reason: str
    """Why it ended."""
    target_metric: str | None
    best: EvaluatedVersion | None
    reached_target_at: int | None


class Coordinator:
    """Collect from regions, count versions, keep the best, and end the run by the first stop rule that holds.

    Runs follow one another in one line of versions. At most one is open.
    """

    def __init__(self, run: str) -> None:
        self.collector = Collector(
            Roster(run=run, region=None, sites=frozenset(), regions=frozenset()),
            lambda event: event.settings.region_goal,
        )
        self.state = RunState.CLOSED
        self.opening: Opening | None = None
        """Opening of the newest run."""
        self.settings: RunSettings | None = None
        """Settings of the newest run, with the stop rules of its last extension."""
        self.past: list[RunRecord] = []
        """Runs before the newest."""
        self._initial_digest: bytes | None = None
        self.evaluated: dict[int, EvaluatedVersion] = {}
        self.best: EvaluatedVersion | None = None
        self.reached_target_at: int | None = None
        """First version whose target metric reached the target."""
        self.reason = ""
        self.target_metric: str | None = None
        """Metric that chooses the best version; None before the first evaluation."""
        self.failed = False
        """Whether the run was closed because it cannot do what it was asked to."""
        self._overdue = False
        """Whether the wait for evaluations is over, so that the run must close once no version is in flight."""
        self.norms = NormHistory(DefenceSettings())
        self.stop = StopSettings()
        """Stop rules of the newest run."""

    @property
    def version(self) -> int:
        """The current model version; -1 before the first."""
        return -1 if self.collector.current is None else self.collector.current.version

    @property
    def in_flight(self) -> Combination | None:
        """The combination in progress, which makes the next version; None if there is none."""
        return self.collector.in_flight

    @property
    def n_buffered(self) -> int:
        """Number of sums taken in and not yet combined."""
        return self.collector.n_buffered

    def known(self, event: Event) -> list[Command] | None:
        """Return the commands that answer a known event, or None; see `Collector.known`."""
        return self.collector.known(event)

    def handle(self, event: Event) -> list[Command]:
        """Take in an event and return the commands that follow."""
        match event:
            case RunOpened():
                return self._open(event)
            case Restored():
                return self._restore(event)
            case WallTimeReached() | RunFailed() | EverySiteFails() | FinalEvaluationOverdue():
                return self._end(event)
        if isinstance(event, Configured) and event.settings is not None:
            self._configure(event.settings)
        if isinstance(event, Combined):
            self._note_norms(event)
        commands = self.collector.handle(event)
        if isinstance(event, EvaluationsSummed) and event.n_sites:
            commands += self._record(event)
        if isinstance(event, VersionAnnounced) and self.n_versions >= self.stop.max_versions:
            commands += self._finish("max_versions reached")
        if isinstance(event, Combined | CombineFailed) and self.state is RunState.FINISHING:
            commands += self._land()
        return commands

    def _land(self) -> list[Command]:
        """Close a finishing run now that no version is in flight, or first await its last evaluations."""
        if self.version in self.evaluated or (self._overdue and self.failed):
            return self._close()
        if not self._overdue:
            return []
        self._overdue = False
        return [AwaitFinalEvaluation(FINAL_EVALUATION_S)]

    def _end(self, event: WallTimeReached | RunFailed | EverySiteFails | FinalEvaluationOverdue) -> list[Command]:
        match event:
            case WallTimeReached():
                return self._finish("max_wall_s reached")
            case RunFailed(reason=reason):
                self.failed = self.failed or self.state is RunState.OPEN
                return self._finish(reason)
            case EverySiteFails(why=why):
                return self._give_up(f"every site fails: {why}")
            case FinalEvaluationOverdue():
                return self._close()

    @property
    def n_versions(self) -> int:
        """Versions of the newest run after its first one."""
        return -1 if self.opening is None else self.version - self.opening.first_version

    @property
    def has_begun(self) -> bool:
        """Whether the first version of the newest opening was announced."""
        current = self.collector.current
        return current is not None and current.opening == self.opening

    @property
    def runs(self) -> list[RunRecord]:
        """Return all runs, the newest last."""
        if self.opening is None or self.settings is None:
            return []
        newest = RunRecord(
            opening=self.opening,
            settings=self.settings,
            state=self.state,
            last_version=self.version,
            reason=self.reason,
            target_metric=self.target_metric,
            best=self.best,
            reached_target_at=self.reached_target_at,
        )
        return [*self.past, newest]

    def outliers(self, combination: Combination, norms: Mapping[str, float]) -> dict[str, str]:
        """Return the sums of ``combination`` that must be left out, each with the reason in words; changes nothing.

        The daemon asks, leaves them out, and reports them in `Combined`. A replay uses that report.

        Args:
            combination: the one in progress.
            norms: L2 norm of each of its decrypted sums, by id.
        """
        return self.norms.outliers(
            {
                contribution_id(part.head): (part.head.region, norms[contribution_id(part.head)])
                for part in combination.parts
                if contribution_id(part.head) in norms
            }
        )

    def without(self, combination: Combination, left_out: Collection[str]) -> Combination:
        """Return ``combination`` as if the sums in ``left_out`` had never come; see `Collector.without`."""
        return self.collector.without(combination, left_out)

    @property
    def bounded(self) -> Mapping[str, ReportBounded]:
        """Regions whose last claim of mass counted only in part."""
        return self.collector.bounded

    def outstanding(self) -> list[Command]:
        """Return the commands that a restarted daemon must execute first."""
        commands = self.collector.outstanding()
        if self.opening is not None and self.settings is not None and not self.has_begun:
            commands.append(OpenRun(self.opening, self.settings, self._initial_digest))
        if self.best is not None:
            commands.append(KeepBest(self.best.version))
        if self.state is RunState.FINISHING:
            commands.append(AwaitFinalEvaluation(FINAL_EVALUATION_S))
        if self.state is RunState.CLOSED:
            commands += self._tell_closed()
        return commands

    def _restore(self, event: Restored) -> list[Command]:
        """Add what was made since the backup. Anything that follows from it comes with the version's announcement."""
        commands = self.collector.handle(event)
        made = list(event.made)
        for note in event.openings:
            self._count_norms([each for each in made if each.version < note.opening.opened_at])
            made = [each for each in made if each.version >= note.opening.opened_at]
            self._open_since(note)
        self._count_norms(made)
        if event.closed is not None and self.opening is not None:
            self.state, self.reason = RunState.CLOSED, event.closed
            closed = RunClosed(reason=event.closed, opened_at=self.opening.opened_at, version=event.version)
            commands += self.collector.handle(closed)
        return commands

    def _open_since(self, note: OpeningNote) -> None:
        """Record a run that was opened or extended since the backup."""
        if note.opening == self.opening:
            return
        n_past, self.state = len(self.past), RunState.CLOSED
        self._open(RunOpened(opening=note.opening, settings=note.settings))
        if len(self.past) > n_past:
            self.past[-1] = replace(self.past[-1], last_version=note.opening.first_version - 1)

    def _count_norms(self, made: Iterable[Composition]) -> None:
        for composition in made:
            for part in composition.parts:
                identity = contribution_id(part.head)
                if identity in composition.norms and identity not in composition.quarantined:
                    self.norms.add(part.head.region, composition.norms[identity])

    def _open(self, event: RunOpened) -> list[Command]:
        """Begin a run, or extend the newest one: its history stays, and the stop rules are replaced."""
        if self.state is not RunState.CLOSED or self.in_flight is not None:
            return []
        if self.opening is None or event.opening.first_version != self.opening.first_version:
            self.past = self.runs
            self.evaluated, self.best, self.reached_target_at, self.target_metric = {}, None, None, None
            self.norms = NormHistory(event.settings.defence)
        elif event.settings.stop.target_metric not in {None, self.target_metric}:
            self.best, self.reached_target_at, self.target_metric = None, None, None  # another metric decides now
        elif event.settings.stop.target != self.stop.target:
            self.reached_target_at = None  # unknown until a version reaches the new target
        self.state, self.reason, self.failed = RunState.OPEN, "", False
        self.opening, self.settings, self.stop = event.opening, event.settings, event.settings.stop
        self._initial_digest = event.initial_digest
        return [OpenRun(event.opening, event.settings, event.initial_digest)]

    def _configure(self, settings: RunSettings) -> None:
        if self.opening is not None and self.opening.opened_at == 0:
            self.settings, self.stop = settings, settings.stop
            self.norms.configure(settings.defence)

    def _tell_closed(self) -> list[Command]:
        return [] if self.opening is None else [CloseRun(self.opening, self.version, self.reason)]

    def _note_norms(self, event: Combined) -> None:
        """Add the norms of the applied sums to the history."""
        combination = self.in_flight
        for part in () if combination is None else combination.parts:
            identity = contribution_id(part.head)
            if identity in event.norms and identity not in event.quarantined:
                self.norms.add(part.head.region, event.norms[identity])

    def _record(self, summed: EvaluationsSummed) -> list[Command]:
        if self.opening is None or summed.version < self.opening.first_version:
            return []  # from an earlier run, which closed without it
        evaluated = EvaluatedVersion(summed.version, summed.n_sites, summed.n_samples, summed.metrics, summed.means)
        self.evaluated[summed.version] = evaluated
        if self.target_metric is None and (unknown := self._choose_target((*summed.metrics, *summed.undefined))):
            self.failed = True
            return [*self._finish(unknown), *self._close()]
        commands = self._compare(evaluated)
        if self.state is RunState.FINISHING and self.version in self.evaluated and self.in_flight is None:
            commands += self._close()
        return commands

    def _choose_target(self, figures: tuple[str, ...]) -> str:
        """Choose the run's metric, or else the usual one; return an error text if the evaluations do not have it."""
        asked = self.stop.target_metric
        if not figures:
            return ""
        if asked is not None and asked not in figures:
            return f"stop.target_metric is {asked!r}, and no evaluation has it; set it to one of: {', '.join(figures)}"
        self.target_metric = asked or (USUAL_METRIC if USUAL_METRIC in figures else figures[0])
        return ""

    def _compare(self, evaluated: EvaluatedVersion) -> list[Command]:
        """Record whether a version is the best so far, or reaches the target."""
        metric, usual = self.target_metric, usual_population(self.evaluated.values())
        value = None if metric is None else evaluated.metrics.get(metric)
        if metric is None or value is None or not evaluated.is_of(usual):
            return []
        commands: list[Command] = []
        if self.best is not None and not self.best.is_of(usual):
            self.best = None  # its figures cover other hospitals or other test cases
        if self.best is None or self.stop.better(metric, value, self.best.metrics[metric]):
            self.best = evaluated
            commands.append(KeepBest(evaluated.version))
        if self.stop.reached(metric, value) and self.reached_target_at is None:
            self.reached_target_at = evaluated.version
            if self.stop.stop_at_target:
                commands += self._finish("target reached")
        return commands

    def _finish(self, reason: str) -> list[Command]:
        if self.state is not RunState.OPEN or self.opening is None:
            return []
        self.state = RunState.FINISHING
        self.reason = reason
        closed = RunClosed(reason=reason, opened_at=self.opening.opened_at, version=self.version)
        commands = self.collector.handle(closed)
        if self.version in self.evaluated and self.in_flight is None:
            return commands + self._close()
        return [*commands, AwaitFinalEvaluation(FINAL_EVALUATION_S)]

    def _give_up(self, reason: str) -> list[Command]:
        """End the run as failed, at once, without waiting for evaluations of a failed model."""
        if self.state is not RunState.OPEN:
            return []
        self.failed = True
        commands = self._finish(reason)
        return [command for command in commands if not isinstance(command, AwaitFinalEvaluation)] + self._close()

    def _close(self) -> list[Command]:
        """Close the run, or note that it must close once the version in flight, its last one, is done."""
        if self.state is not RunState.FINISHING:
            return []
        if self.in_flight is not None:
            self._overdue = True
            return []
        self.state, self._overdue = RunState.CLOSED, False
        return self._tell_closed()
