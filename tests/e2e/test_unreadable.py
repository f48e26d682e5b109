"""A server operator, with every message and every file of the servers, can read no delta and no model."""

import base64
from pathlib import Path

import numpy as np
import pytest
import zstandard
from numpy.typing import NDArray

from fednats.crypto.sealing import ModelKeys
from fednats.storage.checkpoints import checkpoints_folder, frame_file, newest_checkpoint, weights_file
from fednats.storage.chunk_file import read_chunks
from fednats.testbed.launch import Running, running
from fednats.testbed.wan import WanSettings
from tests.e2e.conftest import MakeFederation
from tests.e2e.faults import found, outbox
from tests.e2e.ledgers import balanced
from tests.e2e.tap import tapped
from tests.e2e.until import ENDLESS, end_after, reached, until

N_BYTES = 32
"""Size of the pieces of a delta or model that the search looks for."""

WAITING = (
    "SELECT update_id, quantised FROM chunk WHERE position = 0"
    " AND update_id IN (SELECT update_id FROM outgoing WHERE sent_at IS NULL AND dropped_at IS NULL)"
)


@pytest.mark.parametrize("cipher", ["bfv", "none"])
async def test_neither_deltas_nor_models_are_readable_on_the_bus_in_its_stores_or_in_any_log(
    make_federation: MakeFederation, tmp_path: Path, cipher: str
) -> None:
    """Without the cipher, the same search finds the delta, which shows that the search works."""
    federation = make_federation({"north": ["a", "b"]}, delta={"cipher": cipher}, stop=ENDLESS)
    output = tmp_path / "out"
    async with running(federation, output, {"site-a": WanSettings()}) as now:
        await until(
            now, reached(1)
        )  # a daemon that connects while its server reads the tap's account is refused and ends
        async with tapped(now.servers) as tap:
            link = now.links["site-a"]
            for switch in (
                link.cut,
                link.restore,
                link.cut,
            ):  # resets connections, so the site notices at once, and trains on
                switch()
            # a site forgets sent updates, so read one that waits
            update_id, delta = await found(now, lambda: unsent(now, "a"))
            link.restore()
            await end_after(now, 2)
            await balanced(output)
    assert any(update_id in subject for subject in tap.subjects), "it was sent, and heard"
    stored = [file.read_bytes() for file in (output / "kits").glob("**/store/**/*") if file.is_file()]
    logs = [file.read_bytes() for file in output.glob("**/*.log")]
    assert len(logs) == 4 + 2
    readable = [*tap.read(), *stored]
    pieces = of_delta(delta)
    assert pieces
    assert any(found_in(values, readable) for values in pieces) is (cipher == "none")
    assert not any(found_in(form, logs) for values in pieces for form in as_logged(values))
    sealed, plain = frames(output, federation.name)
    assert all(found_in(chunk, tap.heard) for chunk in sealed), "the search finds what is there"
    assert not any(found_in(values, readable) for values in plain)
    assert not any(found_in(form, logs) for values in plain for form in as_logged(values))


def unsent(now: Running, site: str) -> tuple[str, NDArray[np.int8]] | None:
    """Return an update that waits in a site's outbox, and its delta in steps of the grid."""
    for update_id, quantised in outbox(now, site, WAITING):
        return str(update_id), np.frombuffer(zstandard.decompress(quantised), np.int8)
    return None


def of_delta(delta: NDArray[np.int8]) -> list[bytes]:
    """Return distinctive pieces of the delta as an unencrypted run sends it: its values other than 0."""
    values = delta[delta != 0].tobytes()
    pieces = [values[start : start + N_BYTES] for start in range(0, len(values) - N_BYTES, N_BYTES)]
    return [piece for piece in pieces if len(set(piece)) > N_BYTES // 2]


def frames(output: Path, run: str) -> tuple[list[bytes], list[bytes]]:
    """Return the newest version's sealed chunks, and pieces of their content and of the weights in the clear."""
    folder = checkpoints_folder(output / "coordinator")
    newest = newest_checkpoint(folder)
    assert newest is not None
    keys = ModelKeys.read(output / "kits" / "coordinator" / "model-1.key", None, run)
    sealed, plain = [], []
    for frame in newest.frames[-2:]:
        identity = frame.payload.payload_id
        for position, chunk in enumerate(read_chunks(frame_file(folder, identity))):
            opened = keys.opened(identity, position, chunk)
            sealed.append(chunk)
            plain.append(opened[len(opened) // 2 :][:N_BYTES])
    weights = weights_file(folder, newest.version).read_bytes()
    return sealed, [*plain, weights[-2 * N_BYTES :][:N_BYTES]]


def as_logged(piece: bytes) -> list[bytes]:
    """Return the forms in which a log might show ``piece``."""
    numbers = str(list(np.frombuffer(piece, np.int8)))[1:-1]
    return [
        piece,
        piece.hex().encode(),
        base64.b64encode(piece)[:40],
        repr(piece)[2:-1].encode(),
        numbers.encode(),
        numbers.replace(" ", "").encode(),
    ]


def found_in(piece: bytes, places: list[bytes]) -> bool:
    return any(piece in place for place in places)
