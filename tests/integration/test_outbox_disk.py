"""An outbox on its own disk, which is too small for an update."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fednats.errors import LocalStorageError
from fednats.storage.outbox import ChunkKey, Outbox
from tests.makers import update
from tests.small_disk import small_disk

DISK_BYTES = 8 * 2**20
N_VALUES = 40_000
"""Values in a chunk; with its residual, the chunk takes 400 kB."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, DISK_BYTES):
        yield tmp_path


def store(outbox: Outbox, n_chunks: int) -> None:
    sequence, dropped = outbox.next_sequence(), outbox.begin(max_waiting=4)
    rng = np.random.default_rng(sequence)
    for position in range(n_chunks):
        key = ChunkKey(f"a-{sequence}", sequence, position, position * N_VALUES)
        values = rng.integers(-127, 127, N_VALUES, np.int8)
        outbox.add_chunk(key, rng.bytes(200_000), values, np.zeros(N_VALUES, np.float32))
    outbox.add_update(update("a", sequence), (0.5,), dropped)


def test_an_update_that_does_not_fit_takes_no_room_from_one_that_does(disk: Path) -> None:
    outbox = Outbox(disk / "outbox.sqlite")
    store(outbox, 2)
    outbox.mark_sent("a-1")
    for _ in range(3):
        with pytest.raises(LocalStorageError, match="Make room"):
            store(outbox, 30)
    for sequence in range(2, 8):
        store(outbox, 2)
        assert len(list(outbox.chunks(f"a-{sequence}"))) == 2
        outbox.mark_sent(f"a-{sequence}")
    assert outbox.counts() == {"waiting": 0, "sent": 7, "dropped": 0}
    outbox.close()
