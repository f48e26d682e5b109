"""Replayed updates, by their numbers: refused once they are out of date, and never when they are merely late."""

from pathlib import Path

import pytest

from fednats.errors import Reason, RefusedError
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import Combine, Combined, Command, ContributionArrived, Refuse, Settle
from fednats.protocol.sequences import WINDOW, Sequences
from fednats.protocol.settled import REMEMBERED
from fednats.storage.outbox import Outbox, first_number
from tests.makers import announcement, update


def machine() -> Collector:
    made = Collector(Roster("r", "north", frozenset({"a", "b"}), frozenset()), lambda event: event.settings.goal)
    made.handle(announcement())
    return made


def deliver(collector: Collector, site: str, sequence: int, update_id: str | None = None) -> list[Command]:
    head = update(site, sequence)
    if update_id is not None:
        head = head.model_copy(update={"update_id": update_id})
    commands = collector.handle(ContributionArrived(head=head))
    for command in list(commands):
        if isinstance(command, Combine):
            commands += collector.handle(Combined(combination_id=command.combination.combination_id))
    return commands


def reasons(commands: list[Command]) -> list[Reason]:
    return [command.reason for command in commands if isinstance(command, Refuse)]


def test_an_old_update_is_refused_when_nobody_remembers_its_id() -> None:
    """A settled id is forgotten some day; its number never is."""
    collector = machine()
    for sequence in range(1, WINDOW + 2):
        assert reasons(deliver(collector, "a", sequence) + deliver(collector, "b", sequence)) == []
    assert len(collector._settled) < REMEMBERED
    collector._settled.clear()
    for replayed in (1, WINDOW // 2, WINDOW + 1):
        assert reasons(deliver(collector, "a", replayed)) == [Reason.REPLAYED]
    collector._settled.clear()
    assert "number 1 is out of date" in str(deliver(collector, "b", 1))
    assert "number 5 is in a sum" in str(deliver(collector, "b", 5))
    assert collector.n_buffered == 0


def test_a_number_belongs_to_one_update() -> None:
    collector = machine()
    deliver(collector, "a", 7)
    assert reasons(deliver(collector, "a", 7, "another")) == [Reason.REPLAYED]
    assert reasons(deliver(collector, "b", 7)) == []


def test_an_update_that_was_overtaken_is_no_replay() -> None:
    """What a killed daemon had in its hands comes again after others have been summed."""
    collector = machine()
    for sequence in (1, 3, 4):
        deliver(collector, "a", sequence)
        deliver(collector, "b", sequence)
    assert reasons(deliver(collector, "a", 2)) == []
    assert collector.n_buffered == 1


def test_what_is_settled_is_settled_again_and_not_counted() -> None:
    collector = machine()
    deliver(collector, "a", 1)
    deliver(collector, "b", 1)
    assert deliver(collector, "a", 1) == [Settle(("a-1",))]
    assert collector.n_buffered == 0


def test_a_site_that_begins_anew_is_no_replay_of_itself_but_its_old_updates_are(tmp_path: Path) -> None:
    """A new kit after a revocation, or a disk that was lost: nothing is left but the clock."""
    collector = machine()
    numbers: dict[str, int] = {}
    for began_s, kit in ((1_800_000_000.0, "old"), (1_800_000_060.0, "new")):
        outboxes = {site: Outbox(tmp_path / kit / f"{site}.sqlite", first_number(began_s)) for site in "ab"}
        for _ in range(50):
            for site, outbox in outboxes.items():
                head = update(site, outbox.next_sequence())
                outbox.add_update(head, (1.0,), None)
                assert reasons(deliver(collector, site, head.sequence, f"{site}-{kit}-{head.sequence}")) == []
                numbers.setdefault(kit, head.sequence)
    collector._settled.clear()
    assert reasons(deliver(collector, "a", numbers["old"], "again")) == [Reason.REPLAYED]
    assert reasons(deliver(collector, "a", numbers["new"], "again")) == [Reason.REPLAYED]


def test_a_refused_number_takes_nothing_from_the_window() -> None:
    sequences = Sequences()
    sequences.take(WINDOW + 5, "new")
    for old in (1, 5):
        with pytest.raises(RefusedError, match="out of date"):
            sequences.check(old, "old")
    sequences.check(6, "late")
    assert len(sequences._taken) == 1


def test_the_window_is_bounded() -> None:
    sequences = Sequences()
    for sequence in range(1, 3 * WINDOW):
        sequences.check(sequence, str(sequence))
        sequences.take(sequence, str(sequence))
    assert len(sequences._taken) <= 2 * WINDOW
