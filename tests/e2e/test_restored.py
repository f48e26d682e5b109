"""Daemons lose their disk and are restored from a backup: the run goes on, and the books say what is known."""

import shutil
from pathlib import Path

from typer.testing import CliRunner

from fednats import subjects
from fednats.cli import app
from fednats.errors import CONFIG_EXIT
from fednats.ledger.records import EGRESS_FILE
from fednats.messages import Update
from fednats.permissions import user_name
from fednats.protocol.events import Restored
from fednats.storage.checkpoints import checkpoints_folder, newest_checkpoint
from fednats.storage.outbox import outbox_file
from fednats.subjects import HUB
from fednats.testbed.launch import Running, running
from fednats.transport.bus import Bus
from fednats.verify.books import Book, Fate
from fednats.verify.sent import read_outbox
from tests.e2e.conftest import MakeFederation
from tests.e2e.copies import LEFT_OUT, copied, puts_in_place_of
from tests.e2e.faults import events, found, logged, outbox
from tests.e2e.ledgers import balanced
from tests.e2e.until import ENDLESS, end_after, reached, takes_part, until, version_now

REGION = "aggregator-north"


async def test_a_run_goes_on_with_a_coordinator_an_aggregator_and_a_site_that_are_restored_from_backups(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(
        {"north": ["a", "b"], "south": ["c", "d"]},
        delta={"cipher": "none"},
        server={"momentum": 0.5, "learning_rate": 0.5},
        training={"local_steps": 5, "batch_size": 64, "learning_rate": 0.5, "dp": {"noise_multiplier": 4.0}},
        stop=ENDLESS,
    )
    backups = {name: tmp_path / f"backup-{name}" for name in ("coordinator", REGION)}
    async with running(federation, tmp_path / "out") as now:
        await until(now, reached(2))
        await stopped_copy(now, "coordinator", backups["coordinator"])
        await stopped_copy(now, REGION, backups[REGION])
        await a_site_is_backed_up(now, tmp_path / "backup-site")
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

        await a_site_goes_on_above_what_it_had_sent(now, tmp_path / "backup-site")
        await end_after(now, 2)
        await now.daemons.stop("site")
        ledger = await balanced(tmp_path / "out")
        restorations = [note.split(" ")[1] for note in ledger.notes if note.startswith("restored: ")]
        assert sorted(restorations) == ["a", "hub", "north"]
        the_site_s_ledger_says_what_it_lacks(tmp_path / "out")
        await a_backup_that_cannot_be_brought_up_is_refused(now, tmp_path / "kept")


async def stopped_copy(now: Running, name: str, folder: Path) -> None:
    """Make a backup as in `docs/backup.md`: stop, copy, start."""
    daemon = now.daemons[name]
    assert await daemon.stop() == 0
    shutil.copytree(daemon.state_dir, folder, ignore=LEFT_OUT)
    await daemon.start()


async def a_site_is_backed_up(now: Running, folder: Path) -> None:
    """Back up site a's state and its privacy account, once it has sent an update."""
    await found(now, lambda: outbox(now, "a", "SELECT 1 FROM outgoing WHERE sent_at IS NOT NULL") or None)
    site = now.daemons["site-a"]
    assert await site.stop() == 0
    shutil.copytree(site.state_dir, folder / "state", ignore=LEFT_OUT)
    for file in account_of(now):
        shutil.copy(file, folder)
    await site.start()


async def a_site_goes_on_above_what_it_had_sent(now: Running, backup: Path) -> None:
    """A copy started beside the site ends; the restored site uses no number twice and forgets no spent budget."""
    own = max(numbers(backup / "state"))
    since = f"SELECT 1 FROM outgoing WHERE sequence > {own} AND sent_at IS NOT NULL"  # noqa: S608 - a number
    await found(now, lambda: outbox(now, "a", since) or None)
    async with copied(now, "site-a", backup / "state") as copy:
        assert await copy.wait() == CONFIG_EXIT
        assert "another process sends as a now" in copy.log_tail()

    site = now.daemons["site-a"]
    await site.kill()
    known = max(numbers(site.state_dir))
    put_account_back(now, backup)
    await puts_in_place_of(now, "site-a", backup / "state")
    (restored,) = await found(now, lambda: logged(now, "site-a", "restored_from_older_state") or None)
    assert restored["own_number"] == own
    assert own < restored["newest_number"] <= known
    (number, *_) = await found(now, lambda: accepted_numbers(now, restored["next_number"]) or None)
    assert number == restored["next_number"]
    statuses = await until(now, lambda all_: bool((all_["site-a"]["privacy"] or {}).get("n_unseen")))
    status = statuses["site-a"]
    assert status["restored"]["newest_number"] == restored["newest_number"]
    perhaps_sent_in_part = 1
    assert status["privacy"]["n_unseen"] == restored["newest_number"] - own + perhaps_sent_in_part
    assert logged(now, "site-a", "charged_for_updates_since_backup")
    assert status["refused_by_region"] == {}


def the_site_s_ledger_says_what_it_lacks(output: Path) -> None:
    for site, exit_code, said in (
        ("a", 1, "is from a backup: what left since is not here"),
        ("b", 0, "the chain is whole"),
    ):
        result = CliRunner().invoke(app, ["audit", "verify", str(output / f"site-{site}" / EGRESS_FILE)])
        assert result.exit_code == exit_code
        assert said in result.output


def put_account_back(now: Running, backup: Path) -> None:
    """Replace the privacy account by the backup, with its side files, whose pages SQLite would otherwise mix in."""
    for file in account_of(now):
        file.unlink()
    for file in backup.glob("privacy-a.sqlite*"):
        shutil.copy(file, now.daemons["site-a"].state_dir.parent)


def account_of(now: Running) -> list[Path]:
    """Return the account's file and SQLite's side files."""
    return list(now.daemons["site-a"].state_dir.parent.glob("privacy-a.sqlite*"))


def numbers(state: Path) -> list[int]:
    return [item.sequence for item in read_outbox(outbox_file(state)) or ()]


def accepted_numbers(now: Running, first: int) -> list[int]:
    """Return the numbers of site a's updates, from ``first`` on, that its region has summed."""
    book = Book("north", now.daemons[REGION].state_dir / "journal.sqlite")
    return sorted(
        taken.head.sequence
        for taken in book.taken.values()
        if isinstance(taken.head, Update)
        and taken.head.site == "a"
        and taken.fate is Fate.SUMMED
        and taken.head.sequence >= first
    )


async def a_backup_that_cannot_be_brought_up_is_refused(now: Running, folder: Path) -> None:
    """The bus no longer has the whole newest model: the coordinator says so, and never becomes ready."""
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
