"""The machine of every tier: take contributions in, combine them exactly once, settle them.

A region's aggregator combines by adding ciphertexts, the coordinator by stepping the model. For both, this machine
decides what is combined, when, and with what weight. Feed events to `Collector.handle` and execute the commands it
returns. The same events always lead to the same state; `Collector.outstanding` then returns the commands that were
given and are not done yet.
"""

import hashlib
from collections.abc import Callable, Collection
from dataclasses import replace
from enum import Enum, auto
from typing import Any, ClassVar

from fednats.errors import Reason, RefusedError
from fednats.messages import Aggregate, Composition, Update
from fednats.protocol import admission
from fednats.protocol.admission import Roster
from fednats.protocol.buffer import Buffer, Contribution, Flush, Goal, Terms, contribution_of
from fednats.protocol.early import MAX_AHEAD, MAX_EARLY, Early
from fednats.protocol.evaluations import Evaluations
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    CombineFailed,
    Command,
    Configured,
    ContributionArrived,
    DeadlineReached,
    EvaluationArrived,
    EvaluationsSummed,
    Event,
    Part,
    PresenceChanged,
    Refuse,
    ReportBounded,
    ReportWaiting,
    Restored,
    RunClosed,
    Settle,
    StartTimer,
    VersionAnnounced,
    contribution_id,
)
from fednats.protocol.settled import Settled

_NONE_CLOSED = RunClosed(reason="", opened_at=-1, version=-1)


class CollectorState(Enum):
    """The stage that a collector is in."""

    WAITING = auto()
    """No version is announced yet."""
    COLLECTING = auto()
    COMBINING = auto()
    """One combination is in progress; contributions are taken in meanwhile."""
    CLOSED = auto()


class Collector:
    """Collect for one node: ``roster`` says from whom, ``goal_of`` picks this tier's goal from the settings."""

    def __init__(self, roster: Roster, goal_of: Callable[[VersionAnnounced], Goal]) -> None:
        self.state = CollectorState.WAITING
        self.current: VersionAnnounced | None = None
        self.in_flight: Combination | None = None
        self._ids_in_flight: frozenset[str] = frozenset()
        self._spoilers: set[str] = set()
        """Sources whose contributions have spoilt combinations since the last one that succeeded."""
        self._flush: Flush | None = None
        self._closed = _NONE_CLOSED
        self._roster = roster
        self._present: frozenset[str] | None = None
        self._short = False
        self._goal_of = goal_of
        self._buffer: Buffer | None = None
        self.evaluations = Evaluations(roster)
        self._heads: dict[str, Update | Aggregate] = {}
        self._early: Early[Update | Aggregate] = Early()
        self._settled = Settled()
        self.bounded: dict[str, ReportBounded] = {}
        """Sources whose last claim of mass counted only in part."""

    def handle(self, event: Event) -> list[Command]:
        """Take in an event and return the commands that follow."""
        return self._TRANSITIONS[self.state, type(event)](self, event)

    @property
    def roster(self) -> Roster:
        """Who may contribute."""
        return self._roster

    @property
    def present(self) -> frozenset[str]:
        """The sources that are present; the whole roster before the first `PresenceChanged`."""
        return self._roster.sources if self._present is None else self._roster.sources & self._present

    @property
    def short_of_sites(self) -> bool:
        """Whether too few sites are present to make any sum."""
        return self._short

    def known(self, event: Event) -> list[Command] | None:
        """Return the commands that answer a known event, such as a second delivery; None if the event is new.

        A known event does not change the machine, so it is neither handled nor journalled.
        """
        if isinstance(event, EvaluationArrived):
            return self.evaluations.known(event.evaluation, self.current)
        if not isinstance(event, ContributionArrived):
            return None
        identity = contribution_id(event.head)
        if identity in self._settled and not self._is_in_flight(identity):
            return [self._settled.again(identity)]
        is_held = self._early.holds(admission.source(event.head), identity)
        return [] if is_held or identity in self._heads or self._is_in_flight(identity) else None

    def outstanding(self) -> list[Command]:
        """Return the commands that a restarted daemon must execute first."""
        commands: list[Command] = []
        if self.in_flight is not None:
            commands.append(Combine(self.in_flight))
        commands += self.evaluations.outstanding
        if self.state is not CollectorState.CLOSED and self._buffer:
            commands += self._start_timer()
        if self._short and self.state is not CollectorState.CLOSED:
            commands += self._report_waiting()
        return commands

    @property
    def n_buffered(self) -> int:
        """Contributions taken in and not yet combined."""
        return len(self._heads)

    def buffered(self) -> list[Update | Aggregate]:
        """Return the contributions taken in and not yet combined."""
        return list(self._heads.values())

    def without(self, combination: Combination, left_out: Collection[str]) -> Combination:
        """Return ``combination``, which is in flight, as if the contributions in ``left_out``, by id, had never come.

        The others are weighed anew, so what is left out affects neither their masses nor the length of the step.
        """
        assert self._buffer is not None  # noqa: S101 - something is in flight
        kept = {name: part for part in combination.parts if (name := contribution_id(part.head)) not in left_out}
        flush = self._buffer.weigh([contribution_of(part.head) for part in kept.values()], combination.version)
        parts = tuple(replace(part, mass=mass) for part, mass in zip(kept.values(), flush.masses, strict=True))
        return replace(combination, parts=parts, scale=flush.scale, n_sites=flush.n_sites)

    # --- transitions --------------------------------------------------------------------------------------------------

    def _announce(self, event: VersionAnnounced) -> list[Command]:
        if self.current is not None and event.version < self.current.version:
            return []
        before, self.current = self.current, event
        commands = self._begin(event, before) if self._is_new(event, before) else []
        commands += self._expect()
        assert self._buffer is not None  # noqa: S101 - it exists once a run has begun
        commands += [
            self._refuse_expired(contribution, event.version) for contribution in self._buffer.expire(event.version)
        ]
        for head in self._early.take().values():
            ahead = admission.version(head) - event.version
            commands += self._admit(head, may_be_early=0 < ahead <= MAX_AHEAD)
        commands += self.evaluations.announced(event)
        return commands + self._combine()

    def _configure(self, event: Configured) -> list[Command]:
        self._roster = self._roster.configured(event)
        return self._expect() + self._combine()

    def _see(self, event: PresenceChanged) -> list[Command]:
        self._present = frozenset(event.present)
        return self._expect() + self._combine()

    def _arrive_early(self, event: ContributionArrived) -> list[Command]:
        return self._hold(event.head)

    def _hold(self, head: Update | Aggregate) -> list[Command]:
        """Hold a contribution whose grid is not announced here yet: a site may know a newer version than this node."""
        identity = contribution_id(head)
        try:
            admission.check_sender(head, self._roster)
        except RefusedError as error:
            return [self._refuse(identity, error.reason, error.detail)]
        if self._early.hold(admission.source(head), identity, head):
            return []
        detail = f"grid {head.grid_id} is not known here, and {MAX_EARLY} of {admission.source(head)} wait for theirs"
        return [self._refuse(identity, Reason.WRONG_GRID, detail)]

    def _arrive(self, event: ContributionArrived) -> list[Command]:
        return self._admit(event.head) + self._combine()

    def _arrive_closed(self, event: ContributionArrived) -> list[Command]:
        identity = contribution_id(event.head)
        if admission.version(event.head) > self._last_version:
            return self._hold(event.head)  # the site has heard of the next run, this node has not
        return [] if self._is_in_flight(identity) else [Settle((identity,))]

    def _evaluate(self, event: EvaluationArrived) -> list[Command]:
        return self.evaluations.arrive(event.evaluation, self.current)

    def _summed(self, event: EvaluationsSummed) -> list[Command]:
        assert self.current is not None  # noqa: S101 - sums are asked for only under a version
        return self.evaluations.summed(event, self.current.settings.min_sites)

    def _reach_deadline(self, _event: DeadlineReached) -> list[Command]:
        if not self._buffer or self.current is None:
            return []
        if self.state is CollectorState.COMBINING:
            return self._start_timer()
        commands = self._combine(deadline=True)
        if not commands and self._short:
            commands += self._report_waiting()
        if self._buffer:
            commands += self._start_timer()
        return commands

    def _combined(self, event: Combined) -> list[Command]:
        combination = self._take_in_flight(event.combination_id)
        self._spoilers.clear()
        if self._buffer is not None and self._flush is not None:
            self._buffer.made(self._flush.contributions, self._flush.version, event.quarantined)
        return self._settle_parts(combination, event) + self._combine()

    def _settle_parts(self, combination: Combination, event: Combined) -> list[Command]:
        for part in combination.parts:
            self._settled.settle_number(part.head)
        ids = tuple(contribution_id(part.head) for part in combination.parts)
        summed = tuple(identity for identity in ids if identity not in event.quarantined)
        for identity in summed:
            self._settled.remember(identity)
        refused = [
            self._refuse(identity, Reason.OUTLIER, event.quarantined[identity])
            for identity in ids
            if identity in event.quarantined
        ]
        return [*([Settle(summed)] if summed else []), *refused]

    def _combine_failed(self, event: CombineFailed) -> list[Command]:
        combination = self._take_in_flight(event.combination_id)
        commands: list[Command] = []
        for part in combination.parts:
            identity = contribution_id(part.head)
            if identity in event.refused:
                self._spoilers.add(admission.source(part.head))
                reason, detail = event.refused[identity]
                commands.append(self._refuse(identity, reason, detail))
            elif identity not in event.vanished:
                commands += self._admit(part.head)
        return commands + self._combine()

    def _restore(self, event: Restored) -> list[Command]:
        """Record what was made since the backup, and drop what is held here: anything not in it is delivered again."""
        self.in_flight = self._flush = None
        self._ids_in_flight = frozenset()
        self._heads.clear()
        self._early.take()
        if self._buffer is not None:
            self._buffer.clear()
        if self.state is CollectorState.COMBINING:
            self.state = CollectorState.COLLECTING
        for composition in event.made:
            self._count_made(composition)
        self.evaluations.restore(event)
        return []

    def _count_made(self, composition: Composition) -> None:
        self._settled.note(composition)
        if self._buffer is not None:
            made = [contribution_of(part.head) for part in composition.parts]
            self._buffer.made(made, composition.version, composition.quarantined)

    def _close(self, event: RunClosed) -> list[Command]:
        """Give up the buffered contributions; a combination in progress is finished. Another run may follow."""
        if self.current is not None and event.opened_at < self.current.opening.opened_at:
            return []  # an earlier run's end
        self.state = CollectorState.CLOSED
        self._closed = event
        return self._give_up(event.version)

    def _close_again(self, event: RunClosed) -> list[Command]:
        if event.opened_at > self._closed.opened_at:  # a run was opened and closed, and no version of it came here
            self._closed = event
        return []

    def _announce_closed(self, event: VersionAnnounced) -> list[Command]:
        if event.opening.opened_at > self._closed.opened_at:
            return self._announce(event)
        if self.current is not None and event.version < self.current.version:
            return []
        self.current = event  # the version in flight when the run was closed; it is evaluated like any other
        return self.evaluations.announced(event)

    def _combined_closed(self, event: Combined) -> list[Command]:
        return self._settle_parts(self._take_in_flight(event.combination_id), event)

    def _combine_failed_closed(self, event: CombineFailed) -> list[Command]:
        """Refuse the parts that spoilt the combination and settle the rest: the run is over without them."""
        refusals: list[Command] = []
        left_over: list[str] = []
        for part in self._take_in_flight(event.combination_id).parts:
            identity = contribution_id(part.head)
            if identity in event.refused:
                refusals.append(self._refuse(identity, *event.refused[identity]))
            elif identity not in event.vanished:
                self._settled.remember(identity)
                left_over.append(identity)
        return [*([Settle(tuple(left_over))] if left_over else []), *refusals]

    def _ignore(self, _event: Event) -> list[Command]:
        return []

    # --- helpers of the transitions -----------------------------------------------------------------------------------

    def _is_new(self, event: VersionAnnounced, before: VersionAnnounced | None) -> bool:
        """Whether ``event`` begins or extends a run. The node may not have heard that the run before was closed."""
        return before is None or event.opening.opened_at > before.opening.opened_at

    def _begin(self, event: VersionAnnounced, before: VersionAnnounced | None) -> list[Command]:
        """Continue an extended run, or start another one without anything learned in the one before."""
        commands: list[Command] = [] if before is None else self._give_up(event.opening.opened_at - 1)
        if self._buffer is None or before is None or event.opening.first_version != before.opening.first_version:
            self._buffer, self._flush = Buffer(self._terms(event)), None
            commands += self.evaluations.begin(event.opening.first_version)
            self.bounded = {}
        self._short = False
        self.state = CollectorState.COLLECTING if self.in_flight is None else CollectorState.COMBINING
        return commands

    def _give_up(self, version: int) -> list[Command]:
        """Settle what was taken in and is not for a version after ``version``: the run is over without it."""
        ids = tuple(self._heads)
        self._heads.clear()
        if self._buffer is not None:
            self._buffer.clear()
        for identity, head in self._early.take().items():
            if admission.version(head) > version:
                self._early.hold(admission.source(head), identity, head)
            else:
                ids = (*ids, identity)
        for identity in ids:
            self._settled.remember(identity)
        return [Settle(ids)] if ids else []

    @property
    def _last_version(self) -> int:
        """The newest version of the run that was closed last."""
        return max(self._closed.version, -1 if self.current is None else self.current.version)

    def _expect(self) -> list[Command]:
        """Continue with the sources that are present; report once when they become too few."""
        commands = self.evaluations.expect(self._roster, self.present, self.current)
        if self.current is None:
            return commands
        if self._buffer is not None:
            self._buffer.configure(self._terms(self.current))
        was_short = self._short
        # a region checks this itself: it sends only sums of enough sites, or says that it cannot
        self._short = not self.present & self._roster.regions and len(self.present) < self.current.settings.min_sites
        if self._short and not was_short and self.state is not CollectorState.CLOSED:
            commands += self._report_waiting()
        return commands

    def _terms(self, current: VersionAnnounced) -> Terms:
        return Terms(current.settings, self._goal_of(current), self._roster, self.present, current.capacity)

    def _report_waiting(self) -> list[Command]:
        assert self.current is not None  # noqa: S101 - min_sites comes with a version
        return [ReportWaiting(self.n_buffered, len(self.present), self.current.settings.min_sites)]

    def _admit(self, head: Update | Aggregate, *, may_be_early: bool = True) -> list[Command]:
        assert self._buffer is not None and self.current is not None  # noqa: PT018, S101 - states with a version only
        identity = contribution_id(head)
        if identity in self._settled:
            return [self._settled.again(identity)]
        if identity in self._heads or self._is_in_flight(identity):
            return []
        is_of_this_run = admission.version(head) >= self.current.opening.first_version
        if head.grid_id not in self.current.grid_ids and may_be_early and is_of_this_run:
            return self._hold(head)
        try:
            admission.check(head, self._roster, self.current)
            self._settled.take_number(head)
        except RefusedError as error:
            return [self._refuse(identity, error.reason, error.detail)]
        was_empty = not self._buffer
        self._heads[identity] = head
        self._buffer.add(contribution_of(head))
        return self._start_timer() if was_empty else []

    def _combine(self, *, deadline: bool = False) -> list[Command]:
        if self.state is not CollectorState.COLLECTING or self._buffer is None or self.current is None:
            return []
        version = self.current.version
        flush = None
        if self._spoilers:  # otherwise one source with many bad contributions could spoil every combination
            flush = self._buffer.take(version, deadline=deadline, without=self._spoilers)
        flush = flush or self._buffer.take(version, deadline=deadline)
        if flush is None:
            return []
        self._flush = flush
        self.in_flight = self._combination(flush, version)
        self._ids_in_flight = frozenset(each.contribution_id for each in flush.contributions)
        self.state = CollectorState.COMBINING
        return [*self._report_bounded(flush), Combine(self.in_flight)]

    def _report_bounded(self, flush: Flush) -> list[Command]:
        """Report each source whose claim of mass counts only in part, once until its claims count in full again."""
        before, reports = self.bounded, dict[str, ReportBounded]()
        for contribution, believed in zip(flush.contributions, flush.believed, strict=True):
            if believed < contribution.mass:
                reports[contribution.source] = ReportBounded(contribution.source, contribution.mass, believed)
        sources = {contribution.source for contribution in flush.contributions}
        self.bounded = {source: said for source, said in before.items() if source not in sources} | reports
        return [said for source, said in reports.items() if source not in before]

    def _combination(self, flush: Flush, version: int) -> Combination:
        ids = [contribution.contribution_id for contribution in flush.contributions]
        parts = tuple(
            Part(self._heads.pop(identity), mass, max(0, version - contribution.version))
            for identity, contribution, mass in zip(ids, flush.contributions, flush.masses, strict=True)
        )
        digest = hashlib.blake2b("\n".join([self._roster.region or "", *ids]).encode(), digest_size=16)
        return Combination(digest.hexdigest(), version, parts, flush.scale, flush.n_sites)

    def _take_in_flight(self, combination_id: str) -> Combination:
        combination = self.in_flight
        if combination is None or combination.combination_id != combination_id:
            raise AssertionError(f"combination {combination_id} ended that was not under way")
        self.in_flight, self._ids_in_flight = None, frozenset()
        if self.state is CollectorState.COMBINING:
            self.state = CollectorState.COLLECTING
        return combination

    def _refuse_expired(self, contribution: Contribution, version: int) -> Refuse:
        identity = contribution.contribution_id
        del self._heads[identity]
        return self._refuse(
            identity, Reason.TOO_STALE, f"version {contribution.version} is past the cut-off at {version}"
        )

    def _is_in_flight(self, identity: str) -> bool:
        return identity in self._ids_in_flight

    def _refuse(self, identity: str, reason: Reason, detail: str) -> Refuse:
        refusal = Refuse(identity, reason, detail)
        self._settled.remember(identity, refusal)
        return refusal

    def _start_timer(self) -> list[Command]:
        if self.current is None or self.current.settings.deadline_s is None:
            return []
        return [StartTimer(self.current.settings.deadline_s)]

    _TRANSITIONS: ClassVar[dict[tuple[CollectorState, type[Event]], Callable[[Any, Any], list[Command]]]] = {
        (CollectorState.WAITING, VersionAnnounced): _announce,
        (CollectorState.WAITING, ContributionArrived): _arrive_early,
        (CollectorState.WAITING, Configured): _configure,
        (CollectorState.WAITING, PresenceChanged): _see,
        (CollectorState.WAITING, EvaluationArrived): _evaluate,
        (CollectorState.WAITING, EvaluationsSummed): _summed,
        (CollectorState.WAITING, DeadlineReached): _ignore,
        (CollectorState.WAITING, Restored): _restore,
        (CollectorState.WAITING, RunClosed): _close,
        (CollectorState.COLLECTING, Configured): _configure,
        (CollectorState.COLLECTING, PresenceChanged): _see,
        (CollectorState.COLLECTING, VersionAnnounced): _announce,
        (CollectorState.COLLECTING, ContributionArrived): _arrive,
        (CollectorState.COLLECTING, EvaluationArrived): _evaluate,
        (CollectorState.COLLECTING, EvaluationsSummed): _summed,
        (CollectorState.COLLECTING, DeadlineReached): _reach_deadline,
        (CollectorState.COLLECTING, Restored): _restore,
        (CollectorState.COLLECTING, RunClosed): _close,
        (CollectorState.COMBINING, Configured): _configure,
        (CollectorState.COMBINING, PresenceChanged): _see,
        (CollectorState.COMBINING, VersionAnnounced): _announce,
        (CollectorState.COMBINING, ContributionArrived): _arrive,
        (CollectorState.COMBINING, EvaluationArrived): _evaluate,
        (CollectorState.COMBINING, EvaluationsSummed): _summed,
        (CollectorState.COMBINING, DeadlineReached): _reach_deadline,
        (CollectorState.COMBINING, Combined): _combined,
        (CollectorState.COMBINING, CombineFailed): _combine_failed,
        (CollectorState.COMBINING, Restored): _restore,
        (CollectorState.COMBINING, RunClosed): _close,
        (CollectorState.CLOSED, Configured): _configure,
        (CollectorState.CLOSED, PresenceChanged): _see,
        (CollectorState.CLOSED, VersionAnnounced): _announce_closed,
        (CollectorState.CLOSED, ContributionArrived): _arrive_closed,
        (CollectorState.CLOSED, EvaluationArrived): _evaluate,
        (CollectorState.CLOSED, EvaluationsSummed): _summed,
        (CollectorState.CLOSED, DeadlineReached): _ignore,
        (CollectorState.CLOSED, Combined): _combined_closed,
        (CollectorState.CLOSED, CombineFailed): _combine_failed_closed,
        (CollectorState.CLOSED, Restored): _restore,
        (CollectorState.CLOSED, RunClosed): _close_again,
    }
