"""Daemons whose disk was lost and whose state is restored from a backup: the run goes on, and the books say what is known."""

import shutil
from pathlib import Path

from fednats import subjects
from fednats.permissions import user_name
from fednats.protocol.events import Restored
from fednats.storage.checkpoints import checkpoints_folder, newest_checkpoint
from fednats.subjects import HUB
from fednats.testbed.launch import Running, running
from fednats.transport.bus import Bus
from tests.e2e.conftest import MakeFederation
from tests.e2e.copies import LEFT_OUT, copied, puts_in_place_of
from tests.e2e.faults import events, logged
from tests.e2e.ledgers import balanced
from tests.e2e.until import ENDLESS, end_after, reached, takes_part, until, version_now

REGION = "aggregator-north"


async def test_a_run_goes_on_with_a_coordinator_and_an_aggregator_that_are_restored_from_backups(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(
        {"north": ["a", "b"], "south": ["c", "d"]},
        delta={"cipher": "none"},
        server={"momentum": 0.5, "learning_rate": 0.5},
        stop=ENDLESS,
    )
    backups = {name: tmp_path / f"backup-{name}" for name in ("coordinator", REGION)}
    async with running(federation, tmp_path / "out") as now:
        await until(now, reached(2))
        await stopped_copy(now, "coordinator", backups["coordinator"])
        await stopped_copy(now, REGION, backups[REGION])
        at_backup = version_of(backups["coordinator"])
        shutil.copytree(backups["coordinator"], tmp_path / "kept")
        await until(now, reached(at_backup + 2))
        await takes_part(now, "north")

        for name, backup in backups.items():
            lost = version_now(now)
            await now.daemons[name].kill()
            await puts_in_place_of(now, name, backup)
            statuses = await until(now, reached(lost + 1))
        await takes_part(now, "north")
        said = logged(now, "coordinator", "restored_from_older_state")
        assert [line["own_version"] for line in said] == [at_backup]
        assert at_backup < said[0]["newest_version"] <= lost
        assert statuses["coordinator"]["restored"]["unknown_versions"] == []
        (restored,) = [event for event in events(now, REGION) if isinstance(event, Restored)]
        assert restored.made

        await end_after(now, 2)
        await now.daemons.stop("site")
        ledger = await balanced(tmp_path / "out")
        assert sorted(note.split(" ")[1] for note in ledger.notes if note.startswith("restored: ")) == ["hub", "north"]
        await a_backup_that_cannot_be_brought_up_is_refused(now, tmp_path / "kept")


async def stopped_copy(now: Running, name: str, folder: Path) -> None:
    """Make a backup as `docs/backup.md` says: stop, copy, start."""
    daemon = now.daemons[name]
    assert await daemon.stop() == 0
    shutil.copytree(daemon.state_dir, folder, ignore=LEFT_OUT)
    await daemon.start()


async def a_backup_that_cannot_be_brought_up_is_refused(now: Running, folder: Path) -> None:
    """The newest model is not whole on the bus any more: the coordinator says so, and is never ready."""
    await now.daemons["coordinator"].kill()
    run = now.servers.run
    async with Bus.connect(now.servers.coordinator(), user_name("coordinator", HUB)) as bus:
        await bus.purge(subjects.models_stream(run, HUB), subjects.chunks(subjects.model(run), "*"))
    async with copied(now, "coordinator", folder) as copy:
        assert await copy.wait() == 1
        assert "cannot be made from what the bus has" in copy.log_tail()
        assert "RestoreError" in copy.log_tail()


def version_of(backup: Path) -> int:
    newest = newest_checkpoint(checkpoints_folder(backup))
    assert newest is not None
    return newest.version
