"""One site floods its region with all that it may send: the region's daemon goes on with the honest sites."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from nats.aio.client import Client

from fednats import subjects, wire
from fednats.codec.layout import Layout
from fednats.config import AggregationSettings, DeltaSettings, TrainingSettings
from fednats.delta.encode import encoder
from fednats.errors import BusFullError
from fednats.messages import Evaluation, Grid, ModelManifest, ParameterSpec, Payload, Presence, Receipt, Update
from fednats.permissions import inbox
from fednats.protocol.events import ContributionArrived, EvaluationArrived, Event, PresenceChanged
from fednats.provision.plan import RegionPlan
from fednats.services.tier.pace import BURST
from fednats.services.tier.presence import PAUSE_S
from fednats.storage.journal import read_journal
from fednats.subjects import HUB
from fednats.testbed.processes import DaemonProcess, Daemons
from fednats.transport import streams
from fednats.transport.consumer import MAX_UNSETTLED
from tests.makers import FIRST
from tests.plain_client import plain_client
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "r"
HONEST = ("a", "b")
LIAR = "liar"
N_FLOOD, N_GARBAGE = 3000, 600
DELTA = DeltaSettings(cipher="none")
LAYOUT = Layout((ParameterSpec(name="w", shape=(70_000,)),))
GRID = Grid(grid_id="g0", steps=(0.5,))
ENCODER = encoder(DELTA, None)
SOME = np.random.default_rng(0).normal(scale=20, size=70_000).astype(np.float32)
CHUNKS = tuple(
    chunk.data for chunk in ENCODER.encode(SOME, np.zeros_like(SOME), LAYOUT, GRID, np.random.default_rng(0))
)
DIGESTS = tuple(wire.digest(chunk) for chunk in CHUNKS)
MODEL = subjects.head(subjects.model(RUN))


def manifest(version: int) -> ModelManifest:
    return ModelManifest(
        run=RUN,
        opening=FIRST,
        version=version,
        task="t",
        seed=0,
        parameters=LAYOUT.parameters,
        weights_digest=bytes(16),
        frames=(),
        grid=GRID,
        grid_ids=("g0",),
        key_id=ENCODER.key_id,
        training=TrainingSettings(),
        aggregation=AggregationSettings(goal=2),
        delta=DELTA,
    )


@dataclass
class Region:
    """A region's daemon, and the sites that send to it."""

    bus: ConnectedBus
    daemons: Daemons

    async def status(self) -> dict[str, Any]:
        """Return its /status, which must answer within 2 s, whatever happens."""
        said = await self.daemons.statuses()
        assert "aggregator-north" in said, "/status does not answer"
        return dict(said["aggregator-north"])

    def update(self, site: str, number: int, payload_id: str) -> bytes:
        head = Update(
            run=RUN,
            region="north",
            site=site,
            update_id=f"{site}-{number}",
            sequence=number,
            base_version=0,
            grid_id="g0",
            key_id=ENCODER.key_id,
            n_samples=100,
            saturated=0,
            min_sites=2,
            payload=Payload(payload_id=payload_id, n_bytes=sum(map(len, CHUNKS)), digests=DIGESTS),
        )
        return self.signed(site, head_of(site), head)

    def signed(self, site: str, subject: str, message: Update | Evaluation) -> bytes:
        return self.bus.servers.identity("site", site).sign(subject, message)

    async def send(self, site: str, number: int) -> None:
        """Send an update as a site does."""
        name, data = f"{site}-{number}", self.update(site, number, f"{site}-{number}")
        await self.bus.sites[site].publish_payload(subjects.update(RUN, "north", site), name, CHUNKS)
        await self.bus.sites[site].publish(head_of(site), data, name)

    async def accepted(self, site: str, number: int) -> None:
        """Wait until the receipt of ``site`` says that its update ``number`` is in a sum."""

        async def is_in() -> bool:
            stream, subject = subjects.receipts_stream(RUN, "north"), subjects.receipt(RUN, "north", site)
            record = await self.bus.sites[site].last(stream, subject)
            if record is None:
                return False
            receipt = self.bus.servers.identity("site", site).open(subject, record.data, Receipt)
            found = {verdict.name: verdict.outcome for verdict in receipt.verdicts}
            assert found.get(f"{site}-{number}", "accepted") == "accepted"
            return f"{site}-{number}" in found

        await until(is_in)

    async def events(self) -> list[Event]:
        """Return the events in the daemon's journal."""
        file = self.daemons["aggregator-north"].state_dir / "journal.sqlite"
        return [entry.event for entry in await asyncio.to_thread(read_journal, file)]

    async def journalled(self, site: str) -> int:
        """Count the messages of a site that the daemon has journalled."""
        events = await self.events()
        of_site = [
            event
            for event in events
            if (isinstance(event, ContributionArrived) and isinstance(event.head, Update) and event.head.site == site)
            or (
                isinstance(event, EvaluationArrived)
                and isinstance(event.evaluation, Evaluation)
                and event.evaluation.site == site
            )
        ]
        return len(of_site)

    async def rejected(self, sender: str, reason: str) -> int:
        """Count the stored rejects of one sender for one reason."""
        stream = subjects.rejects_stream(RUN, "north")
        async with plain(self.bus, "observer", "north") as observer:
            question = json.dumps({"subjects_filter": subjects.reject(RUN, "north", sender, reason)}).encode()
            info = await observer.request(f"$JS.API.STREAM.INFO.{stream}", question, timeout=10)
        return sum((json.loads(info.data)["state"].get("subjects") or {}).values())

    async def pending(self, site: str) -> int:
        """Count a site's messages that are not delivered yet, as the region's operator sees them."""
        stream = subjects.updates_stream(RUN, "north", site)
        async with plain(self.bus, "observer", "north") as observer:
            subject = f"$JS.API.CONSUMER.INFO.{stream}.{subjects.durable('north', stream)}"
            info = await observer.request(subject, timeout=10)
        return int(json.loads(info.data)["num_pending"])


def head_of(site: str) -> str:
    return subjects.head(subjects.update(RUN, "north", site))


@asynccontextmanager
async def plain(bus: ConnectedBus, role: str, node: str) -> AsyncIterator[Client]:
    """Connect with plain nats-py and the key of any user."""
    settings = bus.servers.user(role, node) if role == "observer" else bus.servers.site("north", node)
    async with plain_client(settings, inbox_prefix=inbox(f"{role}.{node}")) as client:
        yield client


@pytest_asyncio.fixture
async def region(tmp_path: Path) -> AsyncIterator[Region]:
    plan = (RegionPlan("north", (*HONEST, LIAR)),)
    async with connected_bus(tmp_path, RUN, plan, leaves=False) as bus:
        settings = bus.servers.aggregator_settings("north")
        settings = settings.model_copy(update={"state_dir": tmp_path / "aggregator-north"})
        async with Daemons([DaemonProcess("aggregator", "aggregator-north", settings)]) as daemons:
            made = Region(bus, daemons)
            await bus.coordinator.publish(MODEL, bus.servers.identity("coordinator", HUB).sign(MODEL, manifest(0)), "0")

            async def announced() -> bool:
                return (await daemons.statuses()).get("aggregator-north", {}).get("version") == 0

            await until(announced)
            yield made


async def test_honest_sites_go_on_while_one_floods_with_valid_heads(region: Region) -> None:
    """The 3,000 heads lack their last chunk, so each would spoil a sum when most of it is made."""
    prefix = subjects.update(RUN, "north", LIAR)
    async with plain(region.bus, "site", LIAR) as liar:
        for number in range(1, N_FLOOD + 1):
            name = f"{LIAR}-{number}"
            await liar.publish(subjects.chunk(prefix, name, 0), CHUNKS[0])
            data = region.update(LIAR, number, name)
            await liar.publish(head_of(LIAR), data, headers={"Nats-Msg-Id": f"flood-{number}"})
        await liar.flush(timeout=30)

    async def is_taken_in() -> bool:
        return bool((await region.status())["buffered"] >= MAX_UNSETTLED)

    await until(is_taken_in)
    for number in range(1, 7):
        await asyncio.gather(*(region.send(site, number) for site in HONEST))
        if number > 1:  # the newest may have arrived when only the liar's updates were there
            await asyncio.gather(*(region.accepted(site, number - 1) for site in HONEST))
        await region.status()
    status = await region.status()
    assert status["loop_lag_ms"]["max"] < 1000
    assert status["accepted"] >= 10
    assert status["senders"]["site"]["held_back"] == [LIAR]
    assert await region.pending(LIAR) > N_FLOOD / 2
    assert await region.journalled(LIAR) <= BURST


async def test_heads_that_name_one_payload_are_refused_but_for_its_own(region: Region) -> None:
    """Otherwise a payload sent once would be read and added once for each head."""
    await asyncio.gather(region.send("a", 1), region.send(LIAR, 1))
    for number in range(2, 20):
        await region.bus.sites[LIAR].publish(head_of(LIAR), region.update(LIAR, number, f"{LIAR}-1"), f"again-{number}")

    async def all_refused() -> bool:
        return bool((await region.status())["refusals"] == {"malformed": 18})

    await until(all_refused)
    await region.accepted("a", 1)
    await region.accepted(LIAR, 1)


async def test_garbage_of_one_site_drives_out_nobodys_evidence_and_is_taken_in_at_its_pace(region: Region) -> None:
    """The evidence of an earlier forgery in an honest site's name stays."""
    forged = region.update(LIAR, 1, "x")
    await region.bus.sites["b"].publish(head_of("b"), forged, "forged")
    await until(lambda: region.rejected("b", "signature"))
    async with plain(region.bus, "site", LIAR) as liar:
        for number in range(N_GARBAGE):
            await liar.publish(head_of(LIAR), f"garbage {number}".encode())
        await liar.flush(timeout=30)

    async def is_held_back() -> bool:
        return bool((await region.status())["senders"]["site"]["held_back"] == [LIAR])

    await until(is_held_back)
    await asyncio.gather(*(region.send(site, 1) for site in HONEST))
    await asyncio.gather(*(region.accepted(site, 1) for site in HONEST))
    status = await region.status()
    assert status["loop_lag_ms"]["max"] < 1000
    assert status["refused"] < N_GARBAGE
    assert await region.rejected("b", "signature") == 1
    assert await region.rejected(LIAR, "signature") == streams.REJECTS.max_messages_per_subject
    assert '"sender_held_back"' in region.daemons["aggregator-north"].log_file.read_text()


async def test_chunks_that_no_head_names_fill_their_senders_quota_alone(region: Region) -> None:
    """The quota is small here, as 8 GiB would take too long."""
    stream = streams.updates(RUN, "north", LIAR)
    small = replace(stream, limits=replace(stream.limits, max_bytes=10 * len(CHUNKS[0])))
    await region.bus.aggregators["north"].ensure_stream(small)
    with pytest.raises(BusFullError):
        await region.bus.sites[LIAR].publish_payload(subjects.update(RUN, "north", LIAR), "orphan", CHUNKS * 10)
    for number in (1, 2):
        await asyncio.gather(*(region.send(site, number) for site in HONEST))
        await asyncio.gather(*(region.accepted(site, number) for site in HONEST))

    async def is_named() -> bool:
        return list((await region.status())["senders"]["site"]["streams_nearly_full"]) == [LIAR]

    await until(is_named)
    assert '"stream_nearly_full"' in region.daemons["aggregator-north"].log_file.read_text()


async def test_a_site_that_comes_and_goes_leaves_no_more_than_a_change_a_second(region: Region) -> None:
    bucket, key = subjects.presence_bucket(RUN), subjects.presence_key("site", LIAR)
    began_s = time.monotonic()
    for number in range(301):
        said = Presence(release="0", waits=number % 2 == 1, declined={"site.a": "the liar says so"}, n_sites=1)
        await region.bus.sites[LIAR].put(bucket, key, said.model_dump_json().encode())

    async def is_there() -> bool:
        return bool((await region.status())["sources"]["site"]["present"] == [LIAR])

    await until(is_there)
    changes = sum(isinstance(event, PresenceChanged) for event in await region.events())
    assert 1 <= changes <= 2 + (time.monotonic() - began_s) / PAUSE_S
    assert (await region.status())["declined"] == {}


async def test_what_one_region_stores_at_the_hub_is_no_other_regions(tmp_path: Path) -> None:
    plan = (RegionPlan("north", ("a",)), RegionPlan("south", ("c",)))
    async with connected_bus(tmp_path, RUN, plan, leaves=False) as bus:
        spec = streams.inbox(RUN, HUB, "north", leaves=False)
        await bus.coordinator.ensure_stream(replace(spec, limits=replace(spec.limits, max_bytes=3 * len(CHUNKS[0]))))
        for number in range(6):
            chunk = subjects.chunk(subjects.aggregate(RUN, "north"), "orphan", number)
            await bus.uplinks["north"].publish(chunk, CHUNKS[0], f"orphan.{number}")
        head = subjects.head(subjects.aggregate(RUN, "south"))
        await bus.uplinks["south"].publish(head, b"sum of south", "sum")

        async def has_arrived() -> bool:
            record = await bus.coordinator.last(subjects.inbox_stream(RUN, HUB, "south"), head)
            return record is not None and record.data == b"sum of south"

        await until(has_arrived)

        async def is_full() -> bool:
            return (await bus.coordinator.usage(spec.name)).share > 0.6

        await until(is_full)
