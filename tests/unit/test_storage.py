from pathlib import Path

import numpy as np
import pytest

from fednats.errors import ConfigError, LocalDataError, LocalStorageError
from fednats.messages import Grid
from fednats.protocol.events import Combined, ContributionArrived, Event
from fednats.storage.checkpoints import KEPT_VERSIONS, Checkpoint, Checkpoints
from fednats.storage.journal import Journal, read_journal
from fednats.storage.outbox import Outbox
from tests.makers import aggregate, announcement, update


def store(outbox: Outbox, site: str, sequence: int, residual: float) -> None:
    head = update(site, sequence, version=sequence)
    outbox.add_chunk(head.update_id, 0, b"chunk")
    outbox.add_residual(sequence, 0, np.full(4, residual, np.float32))
    outbox.add_update(head)


def test_an_update_waits_in_the_outbox_until_it_is_sent(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.sqlite")
    store(outbox, "a", 1, 0.5)
    store(outbox, "a", 2, 0.25)
    again = Outbox(tmp_path / "outbox.sqlite")
    assert [head.update_id for head in again.pending()] == ["a-1", "a-2"]
    assert list(again.chunks("a-1")) == [b"chunk"]
    again.mark_sent("a-1")
    assert [head.update_id for head in again.pending()] == ["a-2"]
    assert list(again.chunks("a-1")) == []
    assert again.last_trained() == 2


def test_an_unfinished_update_leaves_the_residual_as_it_was(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.sqlite")
    assert outbox.residual(0, 4).tolist() == [0.0] * 4
    store(outbox, "a", outbox.next_sequence(), 0.5)
    outbox.add_chunk("unfinished", 0, b"chunk")
    outbox.add_residual(2, 0, np.full(4, 9.0, np.float32))
    restarted = Outbox(tmp_path / "outbox.sqlite")
    assert restarted.residual(0, 4).tolist() == [0.5] * 4
    assert restarted.next_sequence() == 2
    assert list(restarted.chunks("unfinished")) == []
    store(restarted, "a", 2, 0.75)
    assert restarted.residual(0, 4).tolist() == [0.75] * 4


def test_a_residual_of_another_model_is_refused(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path / "outbox.sqlite")
    store(outbox, "a", 1, 0.5)
    with pytest.raises(LocalDataError, match="another model"):
        outbox.residual(0, 5)


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


def checkpoint(version: int) -> Checkpoint:
    return Checkpoint(
        version=version,
        state={"weights": np.full(3, version, np.float32), "momentum_buffer": np.ones(3, np.float32)},
        grids=(Grid(grid_id="g", steps=(0.5,)),),
        made_by=f"combination-{version}",
    )


def test_checkpoints_keep_the_newest_few_and_the_best(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    for version in range(KEPT_VERSIONS + 3):
        checkpoints.save(checkpoint(version))
        if version == 1:
            assert checkpoints.keep_best(1)
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.version == KEPT_VERSIONS + 2
    assert newest.state["weights"].tolist() == [newest.version] * 3
    assert newest.made_by == f"combination-{newest.version}"
    assert newest.grids == (Grid(grid_id="g", steps=(0.5,)),)
    assert not checkpoints.keep_best(0)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"best.safetensors", *(f"version-{v}.safetensors" for v in range(3, KEPT_VERSIONS + 3))}


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(checkpoint(1))
    file = tmp_path / "version-1.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"version-1\.safetensors"):
        checkpoints.newest()
