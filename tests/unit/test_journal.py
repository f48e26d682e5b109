import subprocess
import sys
from pathlib import Path

import pytest

from fednats import __version__
from fednats.errors import ConfigError, DatabaseLockedError, LocalStorageError
from fednats.protocol.events import Combined, ContributionArrived, Event
from fednats.storage import database
from fednats.storage.journal import Journal, read_journal, read_readable
from tests.makers import aggregate, announcement, update


def test_a_journal_gives_back_its_events(tmp_path: Path) -> None:
    events: list[Event] = [
        announcement(),
        ContributionArrived(head=update("a")),
        ContributionArrived(head=aggregate("fjord")),
        Combined(combination_id="c"),
    ]
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append(events[:3], at_s=1.5)
    journal.append(events[3:], at_s=2.5)
    entries = list(Journal(tmp_path / "journal.sqlite").replay())
    assert [entry.event for entry in entries] == events
    assert [(entry.sequence, entry.at_s) for entry in entries] == [(1, 1.5), (2, 1.5), (3, 1.5), (4, 2.5)]
    assert read_journal(tmp_path / "journal.sqlite") == entries  # while the daemon has it open


def test_a_journal_on_a_full_disk_says_so_and_keeps_what_it_has(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite"
    journal = Journal(file)
    journal._connection.execute("PRAGMA max_page_count = 20")  # SQLite's own way to have no more room
    n_written = 0

    def fill() -> None:
        nonlocal n_written
        while n_written < 10_000:
            journal.append([ContributionArrived(head=update("a", n_written + k + 1)) for k in range(10)], at_s=0.0)
            n_written += 10

    with pytest.raises(LocalStorageError, match=r"journal\.sqlite: .*full.*make room"):
        fill()
    assert n_written >= 10
    assert len(list(Journal(file).replay())) == n_written


def test_a_journal_with_an_entry_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append([announcement(), Combined(combination_id="c")], at_s=0.0)
    journal._connection.execute("UPDATE event SET body = x'c1' WHERE sequence = 2")
    with pytest.raises(ConfigError, match=r"journal\.sqlite: event 2 cannot be read"):
        list(journal.replay())


def test_there_is_no_journal_to_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.sqlite"):
        read_journal(tmp_path / "absent.sqlite")


def test_a_journal_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_text("not a database, and long enough to be looked at as one\n" * 40)
    with pytest.raises(ConfigError, match=r"journal\.sqlite"):
        Journal(tmp_path / "journal.sqlite")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DELETE FROM event WHERE sequence = 3", "3 rows were written, 2 are there"),
        ("DELETE FROM event WHERE sequence = 1", "3 rows were written, 2 are there"),
        ("UPDATE event SET at_s = 9 WHERE sequence = 2", "of its 3 rows at least one was altered"),
        ("DELETE FROM row_chain", "it has 3 rows and no count of them"),
    ],
)
def test_a_journal_with_events_deleted_or_altered_is_refused_by_name(tmp_path: Path, damage: str, said: str) -> None:
    journal = Journal(tmp_path / "journal.sqlite")
    journal.append([announcement(), Combined(combination_id="c")], at_s=0.0)
    journal.append([Combined(combination_id="d")], at_s=1.0)
    journal._connection.execute(damage)
    with pytest.raises(ConfigError, match=rf"journal\.sqlite: events were deleted or altered: {said}"):
        list(journal.replay())


def test_what_can_be_read_of_another_releases_journal_is_read_and_the_release_is_named(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite"
    journal = Journal(file)
    journal.append([announcement()], at_s=0.0)
    journal.append([Combined(combination_id="c")], at_s=1.0)
    journal._connection.execute("UPDATE event SET kind = 'novel' WHERE sequence = 2")
    journal._connection.execute("INSERT INTO written_by VALUES (2, '9.9.9')")
    entries, problem = read_readable(file)
    assert [entry.event for entry in entries] == [announcement()]
    assert "event 2 cannot be read" in str(problem)
    assert f"Release 9.9.9 wrote it, this is release {__version__}: use release 9.9.9" in str(problem)


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
print("held", flush=True)
sys.stdin.read()
"""


def test_a_locked_journal_names_who_holds_it_and_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    file = tmp_path / "journal.sqlite"
    journal = Journal(file)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DatabaseLockedError) as locked:
            journal.append([announcement()], at_s=0.0)
        holder.kill()
    assert f"process {holder.pid} (python" in str(locked.value)
    assert "make room" not in str(locked.value)
    journal.append([announcement()], at_s=0.0)
    assert len(list(journal.replay())) == 1
