"""One node's journal as a book: the fate of every contribution that the node took in, and of every sum it made."""

from collections.abc import Collection
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from fednats.errors import Reason
from fednats.messages import Aggregate, Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector, CollectorState
from fednats.protocol.compositions import combination_of
from fednats.protocol.coordinator import Coordinator, RunRecord
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    CombineFailed,
    Command,
    ContributionArrived,
    Refuse,
    Restored,
    RunOpened,
    Settle,
    VersionAnnounced,
    contribution_id,
)
from fednats.storage.journal import JournalEntry, read_readable
from fednats.subjects import HUB
from fednats.verify.run_folder import shown


class Fate(Enum):
    """The state of a contribution at the node that took it in."""

    WAITING = "waiting"
    """In the buffer, or in a sum that is being made."""
    SUMMED = "in a sum"
    REFUSED = "refused"
    LEFT_OVER = "left over"
    """The run closed before it was in a sum."""


@dataclass
class Taken:
    """One contribution that a node took in."""

    head: Update | Aggregate
    at_s: float
    """When it was first journalled, in seconds since the epoch; if it is known from a note only, when that was read."""
    fate: Fate = Fate.WAITING
    reason: Reason | None = None
    sums: list[str] = field(default_factory=list)
    """The sums that contain it: one, if all is well."""
    is_noted: bool = False
    """Known from a note, as in `MadeSum`."""


def became(taken: Taken) -> str:
    """Return the fate of a contribution in words."""
    return f"refused: {taken.reason}" if taken.fate is Fate.REFUSED else taken.fate.value


@dataclass
class MadeSum:
    """One sum that a node began to make; at the hub, one version."""

    combination: Combination | None
    """None for a version of which nothing is known."""
    capacity: int | None
    is_done: bool = False
    is_noted: bool = False
    """Whether it is known from the node's note, not from its journal: it was made before a backup was restored."""


class Book:
    """A journal replayed through the machine that wrote it; ``problems`` lists what that machine cannot have done."""

    def __init__(self, node: str, file: Path) -> None:
        self.node = node
        self.taken: dict[str, Taken] = {}
        """By id, in order of arrival."""
        self.made: dict[str, MadeSum] = {}
        """By id, in order of making, without failed ones."""
        self.failed: set[str] = set()
        self.problems: list[str] = []
        self.unknown: list[int] = []
        """At the hub: versions made before a backup was restored of which nothing is known."""
        self.restored_s = 0.0
        """When a backup was last restored, in seconds since the epoch; 0 if never."""
        self._restored_to = -1
        self.n_openings = 0
        """At the hub: how often a run was opened or extended; each time begins with a version that no sum made."""
        self.end_s = 0.0
        self._name = shown(file)
        entries, problem = read_readable(file)
        self.is_whole = problem is None
        """Whether the whole journal could be read; if not, the fates of later contributions are unknown."""
        if problem is not None:
            self.problems.append(f"unreadable: {problem}")
        heads = [entry.event.head for entry in entries if isinstance(entry.event, ContributionArrived)]
        self.run = heads[0].run if heads else ""
        nobody = Roster(self.run, node, frozenset(), frozenset())
        self._machine: Collector | Coordinator = (
            Coordinator(self.run) if node == HUB else Collector(nobody, lambda event: event.settings.goal)
        )
        self._replay(entries)

    @property
    def roster(self) -> Roster:
        """The sites and regions that report here, as last configured."""
        return self._collector.roster

    @property
    def sites(self) -> set[str]:
        """Sites that report here, or have reported."""
        return {*self.roster.sites, *(t.head.site for t in self.taken.values() if isinstance(t.head, Update))}

    @property
    def is_closed(self) -> bool:
        """Whether the node knows that the run is closed; whatever it takes in afterwards is left over."""
        return self._collector.state is CollectorState.CLOSED

    @property
    def in_flight(self) -> Combination | None:
        """The sum in progress at the end of the journal."""
        return self._machine.in_flight

    @property
    def n_versions(self) -> int:
        """At the hub: number of versions made, including the first versions of openings."""
        return self.n_done + self.n_openings

    @property
    def runs(self) -> list[RunRecord]:
        """At the hub: the runs, newest last."""
        return self._machine.runs if isinstance(self._machine, Coordinator) else []

    @property
    def is_opening(self) -> bool:
        """At the hub: whether a run was opened and its first version is not journalled yet."""
        return isinstance(self._machine, Coordinator) and not self._machine.has_begun

    @property
    def n_done(self) -> int:
        """Number of sums made."""
        return sum(made.is_done for made in self.made.values())

    def finish(self, identity: str, quarantined: Collection[str] = ()) -> None:
        """Count a sum as made, also one seen elsewhere that the node was stopped before journalling."""
        made = self.made[identity]
        made.is_done = True
        for part in made.combination.parts if made.combination else ():
            if contribution_id(part.head) in quarantined:
                self.taken[contribution_id(part.head)].fate = Fate.REFUSED
                self.taken[contribution_id(part.head)].reason = Reason.OUTLIER
                continue
            taken = self.taken[contribution_id(part.head)]
            taken.fate = Fate.SUMMED
            taken.sums.append(identity)

    def _replay(self, entries: list[JournalEntry]) -> None:
        expected = 1
        for entry in entries:
            if entry.sequence != expected:
                self.problems.append(f"{self._name}: events {expected} to {entry.sequence - 1} are missing")
            expected = entry.sequence + 1
            self.end_s = max(self.end_s, entry.at_s)
            try:
                self._post(entry)
            except (AssertionError, KeyError):  # raised by the machine for an impossible event
                self.problems.append(
                    f"{self._name}: event {entry.sequence} ({entry.event.kind}) does not follow from those before it"
                )
                return

    def _post(self, entry: JournalEntry) -> None:
        event, in_flight, before = entry.event, self.in_flight, self._version
        if isinstance(event, ContributionArrived):
            self.taken.setdefault(contribution_id(event.head), Taken(event.head, entry.at_s))
        if isinstance(event, Combined) and in_flight is not None:
            self._check_quarantine(entry.sequence, event, in_flight)
        if isinstance(event, Restored):
            self._restore(entry, event)
        self.n_openings += isinstance(event, RunOpened)
        commands = self._machine.handle(event)
        if isinstance(event, Combined) and in_flight is not None:
            self.finish(in_flight.combination_id, event.quarantined)
        elif isinstance(event, CombineFailed) and in_flight is not None:
            del self.made[in_flight.combination_id]
            self.failed.add(in_flight.combination_id)
            for identity in event.vanished:
                del self.taken[identity]  # as if it had not come: it is delivered again
        for command in commands:
            self._take(command)
        if self.node == HUB:
            self._check_versions(entry, before)

    def _restore(self, entry: JournalEntry, event: Restored) -> None:
        """Add what was made since the backup; drop other waiting contributions, which are redelivered if unsettled."""
        self.restored_s = entry.at_s
        self._restored_to = event.version
        self.unknown += event.unknown
        noted = {contribution_id(part.head) for note in event.made for part in note.parts}
        for identity in [
            name for name, taken in self.taken.items() if taken.fate is Fate.WAITING and name not in noted
        ]:
            del self.taken[identity]
        for identity in [name for name, made in self.made.items() if not made.is_done]:
            del self.made[identity]
        opened = self._machine.opening if isinstance(self._machine, Coordinator) else None
        self.n_openings += sum(note.opening != opened for note in event.openings)
        for version in event.unknown:
            self.made[f"unknown-{version}"] = MadeSum(None, None, is_done=True, is_noted=True)
        for note in event.made:
            self.made[note.made_by] = MadeSum(combination_of(note), note.capacity, is_noted=True)
            for part in note.parts:
                taken = Taken(part.head, entry.at_s, is_noted=True)
                self.taken.setdefault(contribution_id(part.head), taken)
            self.finish(note.made_by, note.quarantined)

    def _take(self, command: Command) -> None:
        match command:
            case Combine(combination):
                self.failed.discard(combination.combination_id)
                current = self._collector.current
                self.made[combination.combination_id] = MadeSum(combination, current.capacity if current else None)
            case Refuse(identity, reason, _) if self._is_waiting(identity):
                self.taken[identity].fate = Fate.REFUSED
                self.taken[identity].reason = reason
            case Settle(ids):
                for identity in filter(self._is_waiting, ids):
                    self.taken[identity].fate = Fate.LEFT_OVER
            case _:
                pass

    def _is_waiting(self, identity: str) -> bool:
        return identity in self.taken and self.taken[identity].fate is Fate.WAITING

    @property
    def _collector(self) -> Collector:
        return self._machine.collector if isinstance(self._machine, Coordinator) else self._machine

    @property
    def _version(self) -> int:
        return -1 if self._collector.current is None else self._collector.current.version

    def _check_quarantine(self, sequence: int, event: Combined, in_flight: Combination) -> None:
        """Check that the rule leaves out what was left out, given the norms of earlier sums."""
        if isinstance(self._machine, Coordinator):
            by_rule = self._machine.outliers(in_flight, event.norms)
            if by_rule.keys() != event.quarantined.keys():
                self.problems.append(
                    f"{self._name}: event {sequence}: quarantined {sorted(event.quarantined)}, by rule {sorted(by_rule)}"
                )

    def _check_versions(self, entry: JournalEntry, before: int) -> None:
        """At the hub: check that versions follow one another, and that each combination makes one."""
        event = entry.event
        if (
            isinstance(event, VersionAnnounced)
            and event.version - before not in {0, 1}
            and event.version != self._restored_to
        ):
            self.problems.append(
                f"{self._name}: event {entry.sequence} announces version {event.version} after {before}"
            )
        if isinstance(event, Combined) and self._version != self.n_versions - 1:
            self.problems.append(
                f"{self._name}: event {entry.sequence}: {self.n_versions} versions were made, the newest is {self._version}"
            )
