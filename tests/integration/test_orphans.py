"""Chunks without a head fill a site's stream: they are dropped, and the site's next update is stored."""

import asyncio
import os
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from fednats import subjects
from fednats.errors import BusFullError
from fednats.provision.plan import RegionPlan
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.tier import intake, orphans
from fednats.services.tier.inbox import Inbox
from fednats.services.tier.intake import Intake, of_sites
from fednats.transport import streams
from fednats.transport.bus import Delivery
from fednats.wire import digest
from tests.support.connected_bus import connected_bus, until

RUN = "run"
PREFIX = subjects.update(RUN, "north", "a")
CHUNKS = [os.urandom(2**16) for _ in range(8)]
LOG = structlog.get_logger()


async def test_a_site_whose_stream_is_full_of_what_it_has_left_sends_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quota is small here, and both the hour and the duplicate window are short."""
    monkeypatch.setattr(orphans, "ORPHANED_AFTER_S", 1.5)
    monkeypatch.setattr(intake, "WEIGHED_EVERY_S", 0.1)
    spec = streams.updates(RUN, "north", "a")
    spec = replace(spec, limits=replace(spec.limits, max_bytes=10 * len(CHUNKS[0]), duplicate_window_s=1))
    async with connected_bus(tmp_path, RUN, (RegionPlan("north", ("a",)),), leaves=False) as bus:
        site, region = bus.sites["a"], bus.aggregators["north"]
        await region.ensure_stream(spec)
        daemon = Daemon("aggregator", "north", RUN, LOG)
        daemon.sources["site"] = {"present": ["a"], "waiting": [], "absent": []}
        taken: asyncio.Queue[Delivery] = asyncio.Queue()
        inbox = Inbox(region, lambda _: spec.name, RUN, bus.servers.identity("aggregator", "north"), LOG)
        senders = replace(of_sites(RUN, "north"), stream_of=lambda _: spec)
        receiving = Intake(daemon, inbox, "north", senders, lambda _, delivery: taken.put_nowait(delivery), lambda: 0)
        receiving.expect(["a"])
        running = asyncio.create_task(receiving.run())
        try:

            async def is_listened_to() -> bool:
                return region.n_unsettled(spec.name) == 0

            await until(is_listened_to)
            with pytest.raises(BusFullError):
                await site.publish_payload(PREFIX, "left", CHUNKS * 2)

            async def has_room() -> bool:
                return (await region.usage(spec.name)).share < 0.1

            await until(has_room)
            daemon.sources["site"] = {"present": [], "waiting": [], "absent": ["a"]}  # one short hour is enough
            assert not await site.has_chunk(PREFIX, "left", 7, CHUNKS[7]), "whoever goes on sends all of it again"
            await site.publish_payload(PREFIX, "next", CHUNKS)
            await site.publish(subjects.head(PREFIX), b"next", "head")
            async with asyncio.timeout(30):
                assert (await taken.get()).data == b"next"
            reading = region.read_payload(spec.name, PREFIX, "next", [digest(chunk) for chunk in CHUNKS])
            assert [chunk async for chunk in reading] == CHUNKS
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
