"""A node's evaluations: taken in from the sites and regions below, summed by version, then settled.

Part of `fednats.protocol.collector.Collector`, which knows who is present and which version is current.
"""

from fednats.errors import RefusedError
from fednats.messages import Evaluation, EvaluationBlocks, EvaluationSum
from fednats.protocol.admission import Roster
from fednats.protocol.early import MAX_AHEAD, Early
from fednats.protocol.evaluation_tally import ClosedTally, EvaluationTally
from fednats.protocol.events import (
    Command,
    EvaluationsSummed,
    Refuse,
    ReportNotEvaluated,
    Restored,
    Settle,
    SumEvaluations,
    VersionAnnounced,
    evaluated_by,
    evaluation_id,
)
from fednats.subjects import HUB


class Evaluations:
    """Evaluations that have arrived and are not settled yet."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._tally = EvaluationTally(roster.sources)
        self._early: Early[Evaluation | EvaluationSum] = Early()
        self._summing: dict[int, SumEvaluations] = {}
        self._first_version = 0

    @property
    def outstanding(self) -> tuple[SumEvaluations, ...]:
        """Sums that were asked for and are not done yet."""
        return tuple(self._summing.values())

    def expect(self, roster: Roster, present: frozenset[str], current: VersionAnnounced | None) -> list[Command]:
        """Continue with another ``roster``; ``present`` are the sources present now."""
        self._roster = roster
        self._tally.expect(roster.sources, present)
        return [] if current is None else self._give_out(self._tally.complete(current.settings.min_sites))

    def announced(self, current: VersionAnnounced) -> list[Command]:
        """Take in evaluations that came early, now that ``current`` is known."""
        commands: list[Command] = []
        for identity, evaluation in self._early.take().items():
            is_near = evaluation.version - current.version <= MAX_AHEAD
            commands += self.arrive(evaluation, current) if is_near else [Settle((identity,))]
        return commands

    def begin(self, first_version: int) -> list[Command]:
        """Begin the run whose first version is ``first_version``; give up evaluations of earlier versions."""
        self._first_version = first_version
        given_up = tuple(self._tally.give_up(first_version))
        return [Settle(given_up)] if given_up else []

    def arrive(self, evaluation: Evaluation | EvaluationSum, current: VersionAnnounced | None) -> list[Command]:
        """Take in ``evaluation``, or hold it until its version is announced: a site may hear of it before this node."""
        known = self.known(evaluation, current)
        if known is not None:
            return known
        identity = evaluation_id(evaluation)
        if current is None or evaluation.version > current.version:
            return [] if self._early.hold(evaluated_by(evaluation), identity, evaluation) else [Settle((identity,))]
        if isinstance(evaluation, Evaluation):
            try:
                self._tally.check_cases(evaluation)
            except RefusedError as error:
                return [Refuse(identity, error.reason, error.detail)]
        return self._give_out(self._tally.add(evaluation, current.settings.min_sites))

    def known(self, evaluation: Evaluation | EvaluationSum, current: VersionAnnounced | None) -> list[Command] | None:
        """Return the commands that answer a known or unwanted evaluation; None if it is new and must be handled."""
        identity, source = evaluation_id(evaluation), evaluated_by(evaluation)
        is_ours = evaluation.run == self._roster.run and source in self._roster.sources
        if not is_ours or evaluation.version < self._first_version:
            return [Settle((identity,))]
        if current is None or evaluation.version > current.version:
            return [] if self._early.holds(source, identity) else None
        summing = self._summing.get(evaluation.version)
        if summing is not None and identity in map(evaluation_id, summing.parts):
            return []
        if self._tally.is_closed(evaluation.version):
            return [Settle((identity,))]
        return [] if self._tally.has(evaluation) else None

    def summed(self, event: EvaluationsSummed, min_sites: int) -> list[Command]:
        """Settle a finished sum. If some parts spoilt it, settle those and give the others out again."""
        parts = {evaluation_id(part): part for part in self._summing.pop(event.version).parts}
        if not event.spoilt_by or event.version < self._first_version:
            return [Settle(tuple(parts))]
        others = [part for identity, part in parts.items() if identity not in event.spoilt_by]
        return [Settle(event.spoilt_by), *self._give_out(self._tally.again(event.version, others, min_sites))]

    def has_closed(self, version: int) -> bool:
        """Whether evaluations of ``version`` were given out or given up."""
        return self._tally.is_closed(version)

    @property
    def blocks(self) -> EvaluationBlocks:
        """Which sites have been in the same sums so far, and the smallest sum that each site accepts, in sites."""
        blocks, asked = self._tally.blocks
        return EvaluationBlocks(
            run=self._roster.run,
            node=self._roster.region or HUB,
            blocks=tuple(tuple(sorted(block)) for block in blocks),
            asked=tuple(sorted(asked.items())),
        )

    def restore(self, event: Restored) -> None:
        """Give up everything held here, after a backup was restored.

        A region sums no more evaluations of versions up to the newest. It may have done so since the backup, and a
        second sum over a different set of its sites would reveal the difference to the node above.
        """
        self._early.take()
        self._summing.clear()
        self._tally.forget(event.version if self._roster.region is not None else None)
        if event.blocks is not None:
            self._tally.restore_blocks(event.blocks)

    def _give_out(self, closed: list[ClosedTally]) -> list[Command]:
        """Ask for the sums; their parts are settled once the sums are done."""
        commands: list[Command] = []
        for each in closed:
            if each.summing is None:
                commands.append(ReportNotEvaluated(each.version, len(each.given_up)))
            else:
                self._summing[each.version] = each.summing
                commands.append(each.summing)
            if each.given_up:
                commands.append(Settle(each.given_up))
        return commands
