"""The outbox as worker and daemon use it: nothing is lost, nothing is in two updates."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fednats.codec.layout import Layout
from fednats.errors import ConfigError, LocalDataError, LocalStorageError
from fednats.messages import ParameterSpec
from fednats.storage.outbox import ChunkKey, Outbox, RestoredOutbox
from fednats.storage.residual import Dropped
from tests.makers import update

LAYOUT = Layout([ParameterSpec(name="w", shape=(4,))])
STEPS = (0.5,)


def begin(outbox: Outbox, says: list[int], residual: float, max_waiting: int = 10) -> tuple[int, Dropped | None]:
    """Store the chunks of the next update, two values each, but not its head."""
    sequence, dropped = outbox.next_sequence(), outbox.begin(max_waiting)
    for position, start in enumerate((0, 2)):
        key = ChunkKey(f"a-{sequence}", sequence, position, start)
        values = np.array(says[start : start + 2], np.int8)
        outbox.add_chunk(key, b"chunk%d" % position, values, np.full(2, residual, np.float32))
    return sequence, dropped


def store(outbox: Outbox, says: list[int], residual: float, max_waiting: int = 10) -> Dropped | None:
    sequence, dropped = begin(outbox, says, residual, max_waiting)
    outbox.add_update(update("a", sequence, version=sequence), STEPS, dropped)
    return dropped


def residual(outbox: Outbox, dropped: Dropped | None = None) -> list[float]:
    values: list[float] = outbox.residual(LAYOUT, dropped)[0:4].tolist()
    return values


def sent_chunks(outbox: Outbox, update_id: str) -> int:
    offered = outbox.offer(update_id)
    assert offered is not None
    return offered.n_chunks


@pytest.fixture
def outbox(tmp_path: Path) -> Outbox:
    return Outbox(tmp_path / "outbox.sqlite")


def test_an_update_waits_until_it_is_sent(outbox: Outbox, tmp_path: Path) -> None:
    store(outbox, [1, 2, 3, 4], 0.5)
    store(outbox, [1, 2, 3, 4], 0.25)
    again = Outbox(tmp_path / "outbox.sqlite")
    assert [head.update_id for head in again.pending()] == ["a-1", "a-2"]
    assert list(again.chunks("a-1")) == [b"chunk0", b"chunk1"]
    again.mark_sent("a-1")
    assert [head.update_id for head in again.pending()] == ["a-2"]
    assert list(again.chunks("a-1")) == []
    assert again.last_trained() == 2
    assert again.counts() == {"waiting": 1, "sent": 1, "dropped": 0}


def test_sending_goes_on_where_it_was(outbox: Outbox, tmp_path: Path) -> None:
    store(outbox, [1, 2, 3, 4], 0.5)
    assert sent_chunks(outbox, "a-1") == 0
    outbox.note_sent_chunks("a-1", 1)
    again = Outbox(tmp_path / "outbox.sqlite")
    assert sent_chunks(again, "a-1") == 1
    assert list(again.chunks("a-1", first=1)) == [b"chunk1"]


def test_an_unfinished_update_leaves_the_residual_as_it_was(outbox: Outbox, tmp_path: Path) -> None:
    assert residual(outbox) == [0.0] * 4
    store(outbox, [1, 1, 1, 1], 0.5)
    begin(outbox, [9, 9, 9, 9], 9.0)
    restarted = Outbox(tmp_path / "outbox.sqlite")
    assert residual(restarted) == [0.5] * 4
    store(restarted, [1, 1, 1, 1], 0.75)
    assert residual(restarted) == [0.75] * 4
    assert [head.update_id for head in restarted.pending()] == ["a-1", "a-2"]


def test_a_full_outbox_drops_the_oldest_and_what_it_said_goes_into_the_residual(outbox: Outbox) -> None:
    store(outbox, [1, 2, 3, 4], 0.0)
    store(outbox, [0, 0, 0, 0], 0.25, max_waiting=2)
    dropped = outbox.begin(max_waiting=2)
    assert dropped == Dropped("a-1", STEPS)
    assert residual(outbox, dropped) == [0.75, 1.25, 1.75, 2.25]  # 0.25 left, and 0.5 times what it said
    assert outbox.offer("a-1") is None  # it makes room: it must not be sent any more
    assert store(outbox, [0, 0, 0, 0], 0.125, max_waiting=2) == dropped
    assert [head.update_id for head in outbox.pending()] == ["a-2", "a-3"]
    assert outbox.offer("a-1") is None
    assert list(outbox.chunks("a-1")) == []
    assert outbox.counts() == {"waiting": 2, "sent": 0, "dropped": 1}


def test_an_update_that_was_to_make_room_stays_if_the_newer_one_is_never_stored(outbox: Outbox) -> None:
    store(outbox, [1, 2, 3, 4], 0.0)
    _, dropped = begin(outbox, [0, 0, 0, 0], 0.25, max_waiting=1)
    assert dropped is not None
    assert outbox.begin(max_waiting=9) is None
    assert sent_chunks(outbox, "a-1") == 0
    assert list(outbox.chunks("a-1")) == [b"chunk0", b"chunk1"]
    assert residual(outbox) == [0.0] * 4


def test_an_update_that_was_to_make_room_is_sent_after_a_crash(outbox: Outbox, tmp_path: Path) -> None:
    store(outbox, [1, 2, 3, 4], 0.5)
    begin(outbox, [0, 0, 0, 0], 0.25, max_waiting=1)
    restarted = Outbox(tmp_path / "outbox.sqlite")
    restarted.release()
    assert sent_chunks(restarted, "a-1") == 0
    assert list(restarted.chunks("a-1")) == [b"chunk0", b"chunk1"]
    assert residual(restarted) == [0.5] * 4
    store(restarted, [0, 0, 0, 0], 0.25, max_waiting=1)
    assert [head.update_id for head in restarted.pending()] == ["a-1", "a-2"], "it is under way, and not dropped"


def test_an_update_that_may_be_at_the_bus_already_is_never_dropped(outbox: Outbox) -> None:
    store(outbox, [1, 2, 3, 4], 0.0)
    store(outbox, [1, 2, 3, 4], 0.0)
    assert sent_chunks(outbox, "a-1") == 0
    assert outbox.begin(max_waiting=2) == Dropped("a-2", STEPS)
    assert outbox.offer("a-2") is None
    store(outbox, [1, 2, 3, 4], 0.0, max_waiting=2)
    assert [head.update_id for head in outbox.pending()] == ["a-1", "a-3"]


def test_other_chunk_borders_read_the_same_residual(outbox: Outbox) -> None:
    store(outbox, [1, 2, 3, 4], 0.5)
    assert outbox.residual(LAYOUT, None)[1:3].tolist() == [0.5, 0.5]


def test_a_residual_of_another_model_is_refused(outbox: Outbox) -> None:
    store(outbox, [1, 2, 3, 4], 0.5)
    larger = Layout([ParameterSpec(name="w", shape=(5,))])
    with pytest.raises(LocalDataError, match="another model"):
        _ = outbox.residual(larger, None)[0:5]


def test_a_full_disk_is_an_error_with_a_remedy_and_loses_nothing(outbox: Outbox) -> None:
    store(outbox, [1, 2, 3, 4], 0.5)
    (pages,) = outbox._database.connection.execute("PRAGMA page_count").fetchone()
    outbox._database.connection.execute(f"PRAGMA max_page_count = {pages}")
    key = ChunkKey("a-2", 2, 0, 0)
    with pytest.raises(LocalStorageError, match=r"outbox\.sqlite: .*full.*Make room"):
        outbox.add_chunk(key, bytes(100_000), np.zeros(2, np.int8), np.zeros(2, np.float32))
    assert residual(outbox) == [0.5] * 4
    outbox._database.connection.execute("PRAGMA max_page_count = 100000")
    store(outbox, [1, 2, 3, 4], 0.25)
    assert [head.update_id for head in outbox.pending()] == ["a-1", "a-2"]


def test_an_update_names_the_ledger_s_newest_record_from_its_first_offer_on(outbox: Outbox) -> None:
    store(outbox, [1, 2, 3, 4], 0.5)
    offered = outbox.offer("a-1", "a" * 64)
    again = outbox.offer("a-1", "b" * 64)
    assert offered is not None
    assert offered.update.ledger_head == "a" * 64
    assert again == offered  # the same bytes under the same id: the bus knows it
    assert [update.ledger_head for update in outbox.newest(1)] == ["a" * 64]


def test_an_outbox_with_updates_deleted_is_refused_by_name(outbox: Outbox, tmp_path: Path) -> None:
    store(outbox, [1, 2, 3, 4], 0.5)
    store(outbox, [1, 2, 3, 4], 0.5)
    outbox._database.connection.execute("DELETE FROM outgoing WHERE sequence = 2")
    with pytest.raises(ConfigError, match=r"outbox\.sqlite: updates were deleted.* 2 rows were written, 1 are there"):
        Outbox(tmp_path / "outbox.sqlite")


def test_another_run_begins_without_what_waits_and_what_rounding_left_of_the_one_before(outbox: Outbox) -> None:
    store(outbox, [1, 2, 3, 4], 0.5)
    store(outbox, [1, 2, 3, 4], 0.5)
    assert sent_chunks(outbox, "a-1") == 0
    assert outbox.begin_run(first_version=3) == 1
    assert [head.update_id for head in outbox.pending()] == ["a-1"], "its sending has begun: it may have arrived"
    assert residual(outbox) == [0.0] * 4
    assert outbox.next_sequence() == 3
    store(outbox, [1, 2, 3, 4], 0.25)
    assert outbox.begin_run(first_version=3) == 0, "a restart drops nothing of the run that goes on"
    assert residual(outbox) == [0.25] * 4
    assert outbox.counts() == {"waiting": 2, "sent": 0, "dropped": 1}


def test_threads_take_turns(outbox: Outbox) -> None:
    """The daemon asks from several threads at once: what waits, how far sending has come, what is in the way."""
    store(outbox, [1, 2, 3, 4], 0.5)

    def use(number: int) -> None:
        for turn in range(100):
            outbox.note_sent_chunks("a-1", number)
            if turn % 10 == 0:
                outbox.release()
            assert list(outbox.chunks("a-1")) == [b"chunk0", b"chunk1"]

    with ThreadPoolExecutor(4) as threads:
        for done in [threads.submit(use, number) for number in range(4)]:
            done.result()


def test_an_outbox_from_a_backup_goes_on_above_what_its_region_knows(outbox: Outbox, tmp_path: Path) -> None:
    """What waited may have been sent since, and the updates sent since have made up for the residual."""
    store(outbox, [1, 2, 3, 4], 0.5)
    store(outbox, [1, 2, 3, 4], 0.25)
    outbox.mark_sent("a-1")
    assert (outbox.newest_number(), outbox.restored()) == (2, None)
    found = RestoredOutbox(first=8, own=2, signed=6, known=6, base_version=6)
    outbox.go_above(found)
    again = Outbox(tmp_path / "outbox.sqlite", first=1)
    assert again.restored() == found
    assert (again.newest_number(), again.next_sequence(), again.last_trained()) == (7, 8, 6)
    assert again.pending() == []
    assert again.counts() == {"waiting": 0, "sent": 1, "dropped": 0}
    assert residual(again) == [0.0] * 4
    assert store(again, [5, 5, 5, 5], 0.125, max_waiting=1) is None, "what was given up makes no room"
    assert [head.sequence for head in again.pending()] == [8]
    assert residual(again) == [0.125] * 4
    assert (again.next_sequence(), again.newest_charged()) == (9, 0)
