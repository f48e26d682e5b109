"""An event is durable before it is handled; the loop does not wait for the disk; a disk that is full stops the daemon."""

import asyncio
import sqlite3
import time
from pathlib import Path

import pytest
import structlog

from fednats.errors import LocalStorageError, Reason
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import (
    Combined,
    CombineFailed,
    Command,
    ContributionArrived,
    DeadlineReached,
    Event,
    contribution_id,
)
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.tier import tier as tier_module
from fednats.services.tier.rejects import Rejects
from fednats.services.tier.tier import MAX_BATCH, Handled, Tier
from fednats.storage import database
from fednats.storage.journal import Journal, read_journal
from fednats.transport.bus import Bus
from fednats.transport.connection import Connection
from fednats.transport.upkeep import Upkeep
from tests.makers import announcement, closed, update

ROSTER = Roster(run="r", region="north", sites=frozenset({"a", "b"}), regions=frozenset())


class Watched(Collector):
    """Asserts that what it is told is on disk by then."""

    def __init__(self, file: Path) -> None:
        super().__init__(ROSTER, lambda event: event.settings.goal)
        self.handled: list[Event] = []
        self.n_written = 0
        self._file = file

    def handle(self, event: Event) -> list[Command]:
        if len(self.handled) == self.n_written:
            self.n_written = len(read_journal(self._file))
        self.handled.append(event)
        assert len(self.handled) <= self.n_written, f"{event.kind} is handled and not written"
        return super().handle(event)


class Fixture:
    """A tier over a real journal. It refuses nothing by the bus, which is not connected."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.daemon = Daemon("aggregator", "north", "r", structlog.get_logger())
        self.machine = Watched(file)
        self.noted: list[Handled] = []
        unconnected = Connection("nobody", None)
        rejects = Rejects(Bus(unconnected, Upkeep(unconnected)), "r", "north", self.daemon.log)
        self.journal = Journal(file)
        self.tier = Tier(self.daemon, self.journal, self.machine, rejects, self.noted.append)


@pytest.fixture
def made(tmp_path: Path) -> Fixture:
    return Fixture(tmp_path / "journal.sqlite")


async def test_events_are_written_together_and_handled_in_order(made: Fixture) -> None:
    events = [announcement(), *(ContributionArrived(head=update("a", n + 1)) for n in range(3 * MAX_BATCH))]
    async with made.tier.journalling():
        assert await made.tier.replay() == 0
        await asyncio.gather(*(made.tier.feed(event) for event in events))
        assert made.machine.handled == events
        assert made.machine.n_buffered == len(events) - 1
        await made.tier.feed(DeadlineReached(), DeadlineReached())
        assert len(made.machine.handled) == len(events) + 2
    entries = read_journal(made.file)
    assert [entry.event for entry in entries][:-2] == events
    assert len({entry.at_s for entry in entries}) <= 6  # one time to a transaction


async def test_the_loop_turns_while_the_disk_is_slow(made: Fixture) -> None:
    async with made.tier.journalling():
        blocker = sqlite3.connect(made.file, isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")  # another writer: SQLite makes the journal wait
        feeding = asyncio.ensure_future(made.tier.feed(announcement()))
        slowest_s = 0.0
        for _ in range(50):
            before = time.monotonic()
            await asyncio.sleep(0.005)
            slowest_s = max(slowest_s, time.monotonic() - before)
        assert not feeding.done()
        assert made.machine.handled == []
        blocker.execute("ROLLBACK")
        await feeding
        blocker.close()
    assert slowest_s < 0.2
    assert len(made.machine.handled) == 1


async def test_a_full_disk_stops_the_daemon_and_nothing_that_was_said_to_be_taken_is_lost(made: Fixture) -> None:
    taken = 0

    async def work() -> None:
        nonlocal taken
        async with made.tier.journalling():
            await made.tier.feed(announcement())
            made.journal._connection.execute("PRAGMA max_page_count = 20")
            while taken < 10_000:
                await made.tier.feed(ContributionArrived(head=update("a", taken + 1)))
                taken += 1

    with pytest.raises(ExceptionGroup) as raised:
        await work()
    (error,) = raised.value.exceptions
    assert isinstance(error, LocalStorageError)
    assert 0 < taken < 10_000
    assert len(made.machine.handled) == taken + 1 == len(read_journal(made.file))


async def test_a_restart_shows_the_figures_of_before(made: Fixture) -> None:
    async with made.tier.journalling():
        await made.tier.feed(
            announcement(),
            ContributionArrived(head=update("a", 1)),
            ContributionArrived(head=update("b", 1)),
        )
        assert made.machine.in_flight is not None
        done = Combined(combination_id=made.machine.in_flight.combination_id)
        await made.tier.feed(done, ContributionArrived(head=update("a", 2)))
        await made.tier.feed(ContributionArrived(head=update("b", 2)))
        assert made.machine.in_flight is not None
        bad = contribution_id(made.machine.in_flight.parts[0].head)
        refused = {bad: (Reason.CHECKSUM, "missing")}
        await made.tier.feed(CombineFailed(combination_id=made.machine.in_flight.combination_id, refused=refused))
        again = ContributionArrived(head=update(bad[0], 2))
        await made.tier.feed(again)  # delivered again before it was terminated: refused once
    restarted = Fixture(made.file)
    async with restarted.tier.journalling():
        assert await restarted.tier.replay() == 8
        assert restarted.tier.elapsed_s >= 0
    for tier in (made.tier, restarted.tier):
        assert (tier.accepted, tier.refused, tier.refusals) == (2, 1, {"checksum": 1})
    assert [handled.event for handled in restarted.noted] == [handled.event for handled in made.noted]
    assert [handled.elapsed_s for handled in restarted.noted] == [handled.elapsed_s for handled in made.noted]
    assert b"fednats_contributions_accepted_total 2.0" in restarted.daemon.metrics.text()
    assert b'fednats_refused_total{reason="checksum"} 1.0' in restarted.daemon.metrics.text()


async def test_who_gives_up_waiting_does_not_take_his_event_back(made: Fixture) -> None:
    async with made.tier.journalling():
        feeding = asyncio.ensure_future(made.tier.feed(announcement()))
        await asyncio.sleep(0)
        feeding.cancel()
        await made.tier.feed(closed())
    assert [event.kind for event in made.machine.handled] == ["version_announced", "run_closed"]


async def test_a_locked_journal_is_waited_for_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.05)
    monkeypatch.setattr(tier_module, "RETRY_S", 0.05)
    made = Fixture(tmp_path / "journal.sqlite")
    other = sqlite3.connect(made.file, isolation_level=None)
    async with made.tier.journalling():
        await made.tier.replay()
        with structlog.testing.capture_logs() as lines:
            made.daemon.log = made.tier.log = structlog.get_logger()
            other.execute("BEGIN IMMEDIATE")
            fed = asyncio.create_task(made.tier.feed(announcement()))
            async with asyncio.timeout(10):
                while not lines:  # noqa: ASYNC110 - a log tells no one
                    await asyncio.sleep(0.01)
            assert not fed.done()
            other.execute("ROLLBACK")
            await fed
    other.close()
    assert {line["event"] for line in lines} == {"journal_locked"}
    assert made.machine.handled == [announcement()]
