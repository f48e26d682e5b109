"""One daemon at a time: leases over a real server, between processes with the same name and key."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog

from fednats import subjects
from fednats.errors import FencedError, RivalError
from fednats.permissions import user_name
from fednats.provision.plan import RegionPlan
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.tier import lease
from fednats.services.tier.lease import HeldLease
from fednats.subjects import HUB
from fednats.testbed.bus_servers import BusServers, bus_servers
from fednats.transport import streams
from fednats.transport.bus import Bus
from tests.support.connected_bus import until

RUN = "run"
PREFIX = subjects.model(RUN)
MODELS = subjects.models_stream(RUN, HUB)
HEAD = subjects.head(PREFIX)

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the times of leases, in the same order, so that a newcomer soon takes over and a holder looks often."""
    for name, seconds in {"PATIENCE_S": 1.0, "FRESH_S": 0.6, "LOOK_S": 0.1, "ANSWER_S": 0.5}.items():
        monkeypatch.setattr(lease, name, seconds)


class Process:
    """A process with the coordinator's name and key, and its own state folder."""

    def __init__(self, bus: Bus, servers: BusServers, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.bus = bus
        self.daemon = Daemon("coordinator", HUB, RUN, structlog.get_logger())
        identity = servers.identity("coordinator", HUB)
        self.lease = HeldLease(self.daemon, identity, bus, MODELS, PREFIX, folder)

    async def take(self) -> "Process":
        await self.lease.take(self.make)
        return self

    async def make(self) -> None:
        for stream in streams.at_hub(RUN, (), leaves=False):
            await self.bus.ensure_stream(stream)

    async def publish(self, name: str) -> None:
        await self.lease.publish(lambda fence: self.bus.publish(HEAD, name.encode(), name, fence=fence))


Start = Callable[[str], Awaitable[Process]]


@asynccontextmanager
async def hub(folder: Path) -> AsyncIterator[tuple[BusServers, Start]]:
    """Yield the servers, and a function that starts a process on the state folder of a name; all end together."""
    async with bus_servers(folder, RUN, (RegionPlan("north", ("a", "b")),), leaves=False) as servers:
        ending: list[asyncio.Task[None]] = []

        async def start(name: str) -> Process:
            connected: asyncio.Future[Bus] = asyncio.get_running_loop().create_future()

            async def live() -> None:
                async with Bus.connect(servers.coordinator(), user_name("coordinator", HUB)) as bus:
                    connected.set_result(bus)
                    await asyncio.Event().wait()

            ending.append(asyncio.create_task(live(), name=name))
            return Process(await connected, servers, folder / name)

        try:
            yield servers, start
        finally:
            for task in ending:
                task.cancel()
            await asyncio.gather(*ending, return_exceptions=True)


async def test_a_live_holder_wins_and_is_named_and_counts_its_rivals(tmp_path: Path) -> None:
    async with hub(tmp_path) as (_, start):
        first = await (await start("first")).take()
        await first.publish("a")
        copy = await start("copy")
        with pytest.raises(
            RivalError, match=rf"another coordinator is running: host .*, process {first.lease.status['pid']}"
        ):
            await copy.take()
        assert first.lease.status["rivals_refused"] == 1
        assert b"fednats_rivals_refused_total 1.0" in first.daemon.metrics.text()
        await first.publish("b")
        record = await first.bus.last(MODELS, HEAD)
        assert record is not None
        assert record.data == b"b"


async def test_a_restart_on_the_same_folder_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PATIENCE_S", 1000.0)
    async with hub(tmp_path) as (_, start):
        await (await start("first")).take()
        again = await start("first")
        async with asyncio.timeout(5):
            await again.take()
        assert again.lease.status["term"] == 2


async def test_who_was_silent_is_replaced_and_can_store_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hub(tmp_path) as (_, start):
        silent = await start("first")
        monkeypatch.setattr(silent.lease, "_answer", lambda _question: None)
        await silent.take()
        copy = await (await start("copy")).take()
        with pytest.raises(FencedError):  # the server refuses, whatever the process thinks
            await silent.bus.publish(HEAD, b"late", "late", fence=silent.lease._fence)
        with pytest.raises(RivalError, match="another coordinator has taken over: host"):
            await silent.publish("late")
        with pytest.raises(RivalError, match="taken over"):
            await silent.lease.keep()
        await copy.publish("next")
        record = await copy.bus.last(MODELS, HEAD)
        assert record is not None
        assert record.data == b"next"


async def test_nothing_is_settled_on_a_lease_that_was_not_looked_at_of_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with hub(tmp_path) as (_, start):
        first = await (await start("first")).take()
        await first.lease.confirmed()
        now_s = lease._now_s()
        await until_replaced(first, await start("copy"))
        monkeypatch.setattr(lease, "_now_s", lambda: now_s + 100.0)
        with pytest.raises(RivalError):
            await first.lease.confirmed()


async def until_replaced(first: Process, copy: Process) -> None:
    """Let ``copy`` take over as if the holder had not answered."""
    seen = await first.lease._newest()
    copy.lease._place = first.lease._place
    assert await copy.lease._write(seen, 2)


async def test_a_lease_is_put_back_into_a_stream_that_was_lost(tmp_path: Path) -> None:
    async with hub(tmp_path) as (servers, start):
        first = await (await start("first")).take()
        await servers.hub.kill()
        await servers.hub.wipe()
        await servers.hub.start()
        await until(lambda: recreated(first))
        async with asyncio.timeout(20):
            await first.publish("again")
        assert first.lease.status["term"] == 1
        assert (await first.bus.last(MODELS, subjects.lease(PREFIX))) is not None


async def recreated(process: Process) -> bool:
    async with asyncio.timeout(30):
        return await anext(process.bus.recreated()) == MODELS
