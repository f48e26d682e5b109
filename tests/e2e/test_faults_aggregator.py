"""An aggregator is killed, or its disk is full, at the worst moment: every update still counts exactly once."""

import asyncio
import resource
import sqlite3
from pathlib import Path

from fednats import subjects, wire
from fednats.crypto.signing import unsigned
from fednats.errors import BusError
from fednats.messages import Aggregate, EvaluationSum, Update
from fednats.permissions import user_name
from fednats.protocol.events import Combined, EvaluationsSummed
from fednats.storage.journal import read_journal
from fednats.subjects import HUB
from fednats.testbed.launch import Running, running
from fednats.testbed.wan import WanSettings
from fednats.transport.bus import Bus, StoredMessage
from fednats.verify.books import Book, Fate
from fednats.verify.joined import APPLIED
from fednats.wire import MessageT
from tests.e2e.conftest import MakeFederation
from tests.e2e.ledgers import all_settled, audited, balanced, figures
from tests.e2e.until import closed, reached, until
from tests.support.again import send_coordinator_again, send_region_again, send_site_again
from tests.support.connected_bus import until as happens

RUN = "small"
NORTH = "aggregator-north"
SLOW = WanSettings(delay_ms=400)
"""Delays answers, so that a test can see a request and kill the aggregator before its answer."""


def summed(output: Path) -> list[str]:
    """Return the ids of the sums that the region has journalled as published."""
    entries = read_journal(output / NORTH / "journal.sqlite")
    return [entry.event.combination_id for entry in entries if isinstance(entry.event, Combined)]


def evaluated(output: Path) -> list[int]:
    """Return the versions whose evaluations the region has journalled as summed."""
    entries = read_journal(output / NORTH / "journal.sqlite")
    return [entry.event.version for entry in entries if isinstance(entry.event, EvaluationsSummed)]


async def test_killed_with_half_a_buffer(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation({"north": ["a", "b", "c"]}, aggregation={"goal": "all"}, stop={"max_versions": 4})
    output = tmp_path / "out"

    def waiting() -> set[str]:
        book = Book("north", output / NORTH / "journal.sqlite")
        heads = [taken.head for taken in book.taken.values() if taken.fate is Fate.WAITING]
        return {head.site for head in heads if isinstance(head, Update)}

    async def half_a_buffer() -> bool:
        return await asyncio.to_thread(waiting) == {"a", "b"}

    async with running(federation, output) as federation_running:
        await until(federation_running, reached(1))
        await federation_running.daemons["site-c"].kill()
        await happens(half_a_buffer, patience_s=60)
        await federation_running.daemons[NORTH].kill()
        assert waiting() == {"a", "b"}
        await federation_running.daemons[NORTH].start()
        await federation_running.daemons["site-c"].start()
        statuses = await until(federation_running, closed)
        ledger = await balanced(output)
        await all_settled(federation_running, "north")
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"] == 4 * 3
    assert statuses[NORTH]["accepted"] >= 4 * 3, (
        "it counts on from before it was killed"
    )  # more, if it learned late of the end


async def test_killed_between_publishing_a_sum_and_hearing_that_it_is_stored(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"]}, stop={"max_versions": 3})
    output = tmp_path / "out"
    async with running(federation, output, links={"uplink-north": SLOW}) as federation_running:
        head = subjects.head(subjects.aggregate(RUN, "north"))
        published = (await killed_after(federation_running, head, Aggregate)).aggregate_id
        assert published not in summed(output)
        await federation_running.daemons[NORTH].start()
        await until(federation_running, closed)
        ledger = await balanced(output)
    assert summed(output).count(published) == 1
    assert ledger.accepted[APPLIED] == 3 * 2
    log = (output / NORTH / "daemon.log").read_text()
    assert f'"aggregate_id": "{published}"' not in log, "it was there already, and is made again"


async def test_killed_between_publishing_evaluations_and_hearing_that_they_are_stored(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    """Two sums of one version over different hospitals would reveal their difference to the coordinator."""
    federation = make_federation({"north": ["a", "b"]}, stop={"max_versions": 3})
    output = tmp_path / "out"
    async with running(federation, output, links={"uplink-north": SLOW}) as federation_running:
        published = await killed_after(federation_running, subjects.evaluation_sum(RUN, "north"), EvaluationSum)
        assert published.version not in evaluated(output)
        await federation_running.daemons[NORTH].start()
        await until(federation_running, closed)
        await balanced(output)
    assert evaluated(output).count(published.version) == 1
    sent = [record for record in audited(output)[NORTH] if record.what == "evaluation_sum"]
    assert [record.version for record in sent].count(published.version) == 1, "it was there already"


async def killed_after(federation_running: Running, subject: str, kind: type[MessageT]) -> MessageT:
    """Kill the aggregator as soon as its server has the first message on ``subject``; return that message."""
    servers = federation_running.servers
    direct = servers.uplink("north").model_copy(update={"url": servers.node("north").url})
    async with Bus.connect(direct, user_name("uplink", "north")) as bus:
        published = await first(bus, subject, kind)
    await federation_running.daemons[NORTH].kill()
    return published


async def first(bus: Bus, subject: str, kind: type[MessageT]) -> MessageT:
    """Wait for the first message on ``subject`` at the region's server, and return it."""
    stream = subjects.aggregates_stream(RUN, "north")

    async def look() -> StoredMessage | None:
        try:
            return await bus.last(stream, subject)
        except BusError:  # the aggregator has not created the stream yet
            return None

    record = await happens(look, patience_s=120)
    assert record is not None
    return wire.unpack(unsigned(record.data), kind)


async def test_killed_between_publishing_a_sum_and_acknowledging_its_updates(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"]}, stop={"max_versions": 3})
    output = tmp_path / "out"
    async with running(federation, output, links={NORTH: SLOW}) as federation_running:

        async def first_sum_is_journalled() -> bool:
            journal = output / NORTH / "journal.sqlite"
            return journal.exists() and bool(await asyncio.to_thread(summed, output))

        await happens(first_sum_is_journalled, patience_s=120)
        await federation_running.daemons[NORTH].kill()
        assert (await figures(federation_running, "north"))["num_ack_pending"] >= 2
        assert len(summed(output)) == 1
        await federation_running.daemons[NORTH].start()
        await until(federation_running, closed)
        ledger = await balanced(output)
        await all_settled(federation_running, "north")
    assert ledger.accepted[APPLIED] == 3 * 2


async def test_everything_delivered_again_counts_once(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, stop={"max_versions": 12})
    output = tmp_path / "out"
    async with running(federation, output) as federation_running:
        for version in (2, 5, 8):
            await until(federation_running, reached(version))
            n_kinds = 4 + 2 + 1  # evaluations, their sums, a manifest
            assert await send_all_again(federation_running, f"again-{version}") >= version + n_kinds
        statuses = await until(federation_running, closed)
        await send_all_again(federation_running, "after the end")
        ledger = await balanced(output)
        for node in ("north", "south", HUB):
            await all_settled(federation_running, node, copies=5)
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"] >= 2 * 12
    assert ledger.notes == []
    history = statuses["coordinator"]["history"]
    assert len({evaluated["version"] for evaluated in history}) == len(history)
    assert max(evaluated["n_sites"] for evaluated in history) == 4
    assert [status["refused"] for name, status in statuses.items() if name.startswith("site-")] == [0] * 4


async def send_all_again(federation_running: Running, mark: str) -> int:
    """Publish the heads of all participants once more, under new message ids; return their number."""
    plan = federation_running.servers.plan
    sites = [await send_site_again(federation_running, site, mark) for region in plan.values() for site in region.sites]
    regions = [await send_region_again(federation_running, region, mark) for region in plan]
    return sum(sites) + sum(regions) + await send_coordinator_again(federation_running, mark)


async def test_a_full_disk_stops_the_aggregator_and_room_lets_it_go_on(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    """The kernel lets no file of the daemon grow beyond the journal's size, as a full disk would."""
    federation = make_federation({"north": ["a", "b"]}, stop={"max_versions": 8})
    output = tmp_path / "out"
    async with running(federation, output) as federation_running:
        await until(federation_running, reached(3))
        daemon = federation_running.daemons[NORTH]
        room = (output / NORTH / "journal.sqlite-wal").stat().st_size
        assert room > daemon.log_file.stat().st_size
        resource.prlimit(daemon.pid, resource.RLIMIT_FSIZE, (room, room))
        assert await daemon.wait() == 1
        last = daemon.log_file.read_text().splitlines()[-1]
        assert '"kind": "LocalStorageError"' in last
        assert "make room on its disk" in last
        assert str(output / NORTH) in last
        assert sqlite3.connect(output / NORTH / "journal.sqlite").execute("PRAGMA quick_check").fetchone() == ("ok",)
        await daemon.start()
        statuses = await until(federation_running, closed)
        ledger = await balanced(output)
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"] == 8 * 2
