"""A killed coordinator goes on at the version it had, and applies nothing twice."""

import random
from contextlib import aclosing
from pathlib import Path

from fednats import subjects, wire
from fednats.crypto.signing import unsigned
from fednats.messages import ModelManifest
from fednats.permissions import user_name
from fednats.protocol.events import VersionAnnounced
from fednats.storage.checkpoints import checkpoints_folder, newest_checkpoint, weights_file
from fednats.testbed.launch import Running, running
from fednats.testbed.wan import WanSettings
from fednats.transport.bus import Bus
from fednats.verify.joined import APPLIED
from tests.e2e.conftest import MakeFederation
from tests.e2e.faults import events, found, logged, wide
from tests.e2e.ledgers import balanced
from tests.e2e.until import closed, reached, until


async def test_a_coordinator_killed_between_applying_and_publishing_publishes_what_it_applied(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(
        {"north": ["a", "b"]}, **wide(tmp_path, 130_000), delta={"cipher": "none"}, stop={"max_versions": 5}
    )
    async with running(federation, tmp_path / "out", {"coordinator": WanSettings(mbit=2)}) as now:
        folder = checkpoints_folder(now.output / "coordinator")
        await until(now, reached(1))
        version = await found(now, lambda: applied_but_not_announced(now))
        await now.daemons["coordinator"].kill()
        assert version not in announced(now)
        applied = newest_checkpoint(folder)
        assert applied is not None
        assert applied.version == version
        weights = weights_file(folder, version).read_bytes()
        assert (await manifest(now, 0)).version == version - 1
        n_connected = len(logged(now, "coordinator", "bus_connected"))
        await now.daemons["coordinator"].start()
        await found(now, lambda: logged(now, "coordinator", "bus_connected")[n_connected:] or None)
        await loses_its_bus_as_it_starts(now)
        told = await manifest(now, version)
        assert (told.version, told.weights_digest) == (version, applied.weights_digest)
        assert weights_file(folder, version).read_bytes() == weights
        statuses = await until(now, closed)
        ledger = await balanced(tmp_path / "out")
    assert statuses["coordinator"]["version"] == 5
    assert statuses["coordinator"]["n_updates"] == 2 * 5
    assert ledger.accepted[APPLIED] == 2 * 5


async def test_a_coordinator_killed_again_and_again_applies_every_update_once(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, stop={"max_versions": 10})
    moments = random.Random(7)
    async with running(federation, tmp_path / "out") as now:
        statuses = await until(now, reached(1))
        for _ in range(3):
            at_event = len(events(now, "coordinator")) + moments.randrange(1, 12)
            await found(now, lambda at_event=at_event: len(events(now, "coordinator")) >= at_event or None)  # type: ignore[misc]
            await now.daemons["coordinator"].kill()
            await now.daemons["coordinator"].start()
        statuses = await until(now, closed)
        ledger = await balanced(tmp_path / "out")
    made = [event.version for event in events(now, "coordinator") if isinstance(event, VersionAnnounced)]
    assert made == sorted(made)
    assert set(made) == set(range(11))
    assert statuses["coordinator"]["version"] == 10
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"] >= 2 * 10


async def loses_its_bus_as_it_starts(now: Running) -> None:
    """Cut the coordinator's link after it has connected, but before its first request; it waits, and goes on."""
    link = now.links["coordinator"]
    link.cut()
    link.restore()  # resets the connection, which it notices at once
    link.cut()
    await found(now, lambda: logged(now, "coordinator", "bus_waits") or None)
    link.restore()


def applied_but_not_announced(now: Running) -> int | None:
    newest = newest_checkpoint(checkpoints_folder(now.output / "coordinator"))
    if newest is None or newest.version < 2 or newest.version in announced(now):
        return None
    return newest.version


def announced(now: Running) -> set[int]:
    return {event.version for event in events(now, "coordinator") if isinstance(event, VersionAnnounced)}


async def manifest(now: Running, at_least: int) -> ModelManifest:
    """Return the first manifest of version ``at_least`` or later that a site of north receives."""
    stream, subject = subjects.models_stream("small", "north"), subjects.head(subjects.model("small"))
    async with (
        Bus.connect(now.servers.site("north", "b"), user_name("site", "b")) as bus,
        aclosing(bus.follow(stream, [subject])) as records,
    ):
        async for record in records:
            told = wire.unpack(unsigned(record.data), ModelManifest)
            if told.version >= at_least:
                return told
    raise AssertionError("following has ended")
