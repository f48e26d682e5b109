"""Chunks on their way to a stream whose answers the test holds back."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from fednats import subjects
from fednats.transport import payload
from fednats.transport.flow import Flow

CHUNKS = [b"a" * 1000, b"b" * 1000, b"c" * 1000, b"d"]


class Server:
    """A connection whose stream stores a chunk when it answers; it answers for ``slow`` only when told to."""

    def __init__(self, slow: int) -> None:
        self.up = Flow()
        self.stored: list[int] = []
        self.answering = asyncio.Event()
        self._slow = slow

    async def request(
        self, subject: str, _data: bytes, _headers: dict[str, str], _timeout_s: float | None = None
    ) -> SimpleNamespace:
        number = int(subject.rsplit(".", 1)[1])
        if number == self._slow:
            await self.answering.wait()
        self.stored.append(number)
        return SimpleNamespace(data=json.dumps({"seq": 1}).encode())


@pytest.mark.parametrize("slow", [0, 1, 2])
async def test_the_last_chunk_is_stored_after_all_others(slow: int) -> None:
    """Else one that is there would not say that the payload is whole, and a killed sender would announce half of it."""
    server, noted = Server(slow), []

    async def note(n_chunks: int) -> None:
        noted.append(n_chunks)

    sending = asyncio.create_task(
        payload.publish(server, subjects.model("r"), "k1", CHUNKS, 0, note)  # type: ignore[arg-type]
    )
    for _ in range(20):
        await asyncio.sleep(0)
    assert set(server.stored) == {0, 1, 2} - {slow}
    server.answering.set()
    await sending
    assert server.stored[-1] == len(CHUNKS) - 1
    assert noted == [1, 2, 3, 4]


async def test_a_payload_of_one_chunk_and_one_of_none() -> None:
    server = Server(slow=9)
    await payload.publish(server, subjects.model("r"), "k1", [b"only"], 0, None)  # type: ignore[arg-type]
    await payload.publish(server, subjects.model("r"), "k2", [], 0, None)  # type: ignore[arg-type]
    assert server.stored == [0]
