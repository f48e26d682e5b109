"""The bytes that leave over a real connection and those on record are exactly the same."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import structlog

from fednats import subjects, wire
from fednats.errors import LocalStorageError
from fednats.ledger import records as egress
from fednats.ledger.audit import audit
from fednats.ledger.records import LedgerRecord
from fednats.messages import Payload
from fednats.provision.plan import RegionPlan
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.recorder import Recorder, entry_of
from fednats.transport.bus import Bus
from tests.makers import update
from tests.support.connected_bus import ConnectedBus, connected_bus

RUN = "r"
PREFIX = subjects.update(RUN, "north", "a")
HEAD = subjects.head(PREFIX)
CHUNKS = (b"first chunk", b"second chunk")
PAYLOAD = Payload(payload_id="u1", n_bytes=sum(map(len, CHUNKS)), digests=tuple(wire.digest(chunk) for chunk in CHUNKS))
UPDATE = update("a").model_copy(update={"payload": PAYLOAD})
ENTRY = entry_of("update", UPDATE, version=0, name="u1", payload=PAYLOAD)


@pytest_asyncio.fixture
async def bus(tmp_path: Path) -> AsyncIterator[ConnectedBus]:
    async with connected_bus(tmp_path, RUN, (RegionPlan("north", ("a", "b")),), leaves=False) as connected:
        yield connected


@pytest.fixture
def recorder(bus: ConnectedBus, tmp_path: Path) -> Recorder:
    daemon = Daemon("site", "a", RUN, structlog.get_logger())
    return Recorder(daemon, bus.servers.identity("site", "a"), tmp_path / "egress-ledger.jsonl")


def records(tmp_path: Path) -> list[LedgerRecord]:
    found = audit(tmp_path / "egress-ledger.jsonl")
    assert found.findings == []
    return found.records


def total(recorded: list[LedgerRecord]) -> tuple[int, int]:
    return sum(record.n_messages for record in recorded), sum(record.n_bytes for record in recorded)


async def presence(bus: ConnectedBus) -> None:
    await bus.sites["a"].put(subjects.presence_bucket(RUN), subjects.presence_key("site", "a"), b"0.1.0")


async def test_all_bytes_are_on_record(bus: ConnectedBus, recorder: Recorder, tmp_path: Path) -> None:
    site = bus.sites["a"]
    await presence(bus)
    async with recorder.sending(site, ENTRY):
        assert records(tmp_path)[-1].digest == ENTRY.digest, "it is on record before it leaves"
        await site.publish_payload(PREFIX, "u1", CHUNKS)
        await presence(bus)  # other messages meanwhile are not counted as part of it
        await site.publish(HEAD, bus.servers.identity("site", "a").sign(HEAD, UPDATE), "u1")
    await presence(bus)
    await recorder.sum_up(site)
    recorded = records(tmp_path)
    assert [record.what for record in recorded] == ["update", "other"]
    assert total(recorded) == site.sent
    assert total(recorded[:1]) == (3, PAYLOAD.n_bytes + len(wire.pack(UPDATE)) + 64)
    assert total(recorded[1:]) == (3, 3 * len("0.1.0"))
    await recorder.sum_up(site)
    assert len(records(tmp_path)) == 2, "nothing has left since"


async def send_half(recorder: Recorder, site: Bus) -> None:
    async with recorder.sending(site, ENTRY):
        await site.publish_payload(PREFIX, "u1", CHUNKS[:1])
        raise InterruptedError


async def test_an_attempt_that_failed_hides_nothing(bus: ConnectedBus, recorder: Recorder, tmp_path: Path) -> None:
    """More is on record than has left, yet later messages are still recorded."""
    site = bus.sites["a"]
    for _ in range(2):
        with pytest.raises(InterruptedError):
            await send_half(recorder, site)
    await presence(bus)
    await recorder.sum_up(site)
    recorded = records(tmp_path)
    assert [record.what for record in recorded] == ["update", "update", "other"]
    assert total(recorded[2:]) == (1, len("0.1.0"))
    assert total(recorded)[1] >= site.sent[1]


async def test_what_cannot_be_recorded_does_not_leave(
    bus: ConnectedBus, recorder: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_file: int, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    before = bus.sites["a"].sent
    with monkeypatch.context() as patched:
        patched.setattr(egress, "_write", full)
        with pytest.raises(LocalStorageError, match="make room"):
            async with recorder.sending(bus.sites["a"], ENTRY):
                raise AssertionError("it is not sent")
    assert bus.sites["a"].sent == before
    assert records(tmp_path) == []
