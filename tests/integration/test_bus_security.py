"""Single updates stay in their region, whatever a user above it requests; a site is confined to its own subjects."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats.errors
import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from fednats import permissions, subjects
from fednats.config import BusSettings, parse
from fednats.errors import BusError
from fednats.permissions import Permissions, User
from fednats.provision import accounts, sharing
from fednats.provision.authority import CA_FILE
from fednats.provision.kits import provision
from fednats.provision.plan import Kits, LeafAddress, Plan, RegionPlan
from fednats.provision.registry import Registry
from fednats.provision.sharing import BusAccount
from fednats.subjects import HUB
from fednats.testbed.nats_server import NatsServer, Ports
from fednats.transport import streams
from fednats.transport.bus import Bus
from tests.plain_client import plain_client
from tests.rogue_leaf import rogue_leaf
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "run"
PLAN = (RegionPlan("north", ("a", "b")), RegionPlan("south", ("c",)))
SECRET = b"the update of hospital a"
UPDATE = subjects.head(subjects.update(RUN, "north", "a"))
UPDATES = subjects.updates_stream(RUN, "north", "a")
AGGREGATES = subjects.aggregates_stream(RUN, "north")
ANSWER_S = 0.3
"""Permitted requests are answered within this time here, and refused ones far sooner."""

pytestmark = pytest.mark.asyncio(loop_scope="module")
with_leaves = pytest.mark.parametrize("bus", [True], indirect=True, ids=["leaves"], scope="module")
"""For tests that need leaves; without them, the hub's operator has the aggregates anyway."""


def asked_of(api: str, stream: str, *, reads: bool = True) -> list[tuple[str, object]]:
    """Return all requests that read a message or change a stream through a JetStream API."""
    consumer = {"ack_policy": "none", "deliver_policy": "all", "deliver_subject": "stolen.here"}
    pull = {"ack_policy": "none", "deliver_policy": "all", "durable_name": "thief"}
    reading: list[tuple[str, object]] = [
        (f"{api}.STREAM.INFO.{stream}", {"subjects_filter": ">"}),
        (f"{api}.STREAM.NAMES", {}),
        (f"{api}.STREAM.LIST", {}),
        (f"{api}.STREAM.MSG.GET.{stream}", {"last_by_subj": UPDATE}),
        (f"{api}.STREAM.MSG.GET.{stream}", {"seq": 1}),
        (f"{api}.DIRECT.GET.{stream}", {"last_by_subj": UPDATE}),
        (f"{api}.DIRECT.GET.{stream}.{UPDATE}", None),
        (f"{api}.STREAM.SNAPSHOT.{stream}", {"deliver_subject": "stolen.here"}),
        (f"{api}.CONSUMER.CREATE.{stream}", {"stream_name": stream, "config": consumer}),
        (f"{api}.CONSUMER.CREATE.{stream}.thief", {"stream_name": stream, "config": pull}),
        (f"{api}.CONSUMER.CREATE.{stream}.thief.{UPDATE}", {"stream_name": stream, "config": pull}),
        (f"{api}.CONSUMER.DURABLE.CREATE.{stream}.thief", {"stream_name": stream, "config": pull}),
        (f"{api}.CONSUMER.MSG.NEXT.{stream}.{subjects.durable('north', stream)}", {"batch": 1, "no_wait": True}),
        (f"{api}.CONSUMER.NAMES.{stream}", {}),
        (f"{api}.CONSUMER.LIST.{stream}", {}),
    ]
    changing: list[tuple[str, object]] = [
        (f"{api}.STREAM.DELETE.{stream}", None),
        (f"{api}.STREAM.PURGE.{stream}", {}),
        (f"{api}.STREAM.UPDATE.{stream}", {"name": stream, "subjects": ["nothing"], "max_msgs": 1}),
        (f"{api}.STREAM.MSG.DELETE.{stream}", {"seq": 1}),
        (f"{api}.CONSUMER.DELETE.{stream}.{subjects.durable('north', stream)}", None),
    ]
    return reading + changing if reads else changing


def plan_of(region: RegionPlan, **changes: Any) -> Plan:
    """Return the plan of an unencrypted federation of one region."""
    run = {"name": RUN, "delta": {"cipher": "none"}}
    raw = {"run": run, "regions": (region,), "task": {"path": "breast-cancer"}, **changes}
    return parse(raw, Plan, source="test")


class Prober:
    """A plain NATS client, as a thief of credentials would use."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.heard: list[bytes] = []
        self.answers: list[bytes] = []

    async def listen(self, *wanted: str) -> None:
        async def keep(message: Msg) -> None:
            self.heard.append(message.data)

        for subject in wanted:
            await self.client.subscribe(subject, cb=keep)
        await self.client.flush()

    async def ask(self, subject: str, body: object) -> dict[str, object] | bytes | None:
        """Return JetStream's answer, the message received, or None if there was no answer."""
        data = b"" if body is None else json.dumps(body).encode()
        try:
            message = await self.client.request(subject, data, timeout=ANSWER_S)
        except nats.errors.Error:
            return None
        self.answers.append(message.data)
        with contextlib.suppress(ValueError):
            answer = json.loads(message.data)
            if isinstance(answer, dict):
                return answer
        return message.data

    async def harmless(self, subject: str, body: object) -> bool:
        """Return whether the request got no answer, an empty one, or the answer that something was not found."""
        answer = await self.ask(subject, body)
        return answer is None or (isinstance(answer, dict) and "not found" in str(answer.get("error"))) or answer == b""

    def seen(self) -> bool:
        """Return whether it received an update, or an answer that names the stream of updates."""
        return any(SECRET in data for data in self.heard + self.answers) or UPDATES.encode() in b"".join(self.answers)


@contextlib.asynccontextmanager
async def prober(settings: BusSettings, name: str) -> AsyncIterator[Prober]:
    async def ignore(_error: Exception) -> None:
        """Ignore the server's denials; the tests check what arrived."""

    inbox = permissions.inbox(name)
    async with plain_client(settings, inbox_prefix=inbox, error_cb=ignore, allow_reconnect=False) as client:
        yield Prober(client)


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[True, False], ids=["leaves", "no-leaves"])
async def bus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ConnectedBus]:
    async with connected_bus(tmp_path_factory.mktemp("bus"), RUN, PLAN, leaves=request.param) as connected:
        await connected.sites["a"].publish(UPDATE, SECRET, message_id="first")
        await connected.uplinks["north"].publish(
            subjects.head(subjects.aggregate(RUN, "north")), b"sum", message_id="s"
        )
        yield connected


async def send_another(bus: ConnectedBus, message_id: str) -> None:
    """Publish an update during the probe, and assert that the region has it: the positive control of listening."""
    await bus.sites["a"].publish(UPDATE, SECRET, message_id=message_id)
    record = await bus.aggregators["north"].last(UPDATES, UPDATE)
    assert record is not None
    assert record.data == SECRET


async def assert_nothing_got(thief: Prober, bus: ConnectedBus, message_id: str) -> None:
    await thief.listen("stolen.here")
    with contextlib.suppress(nats.errors.Error):
        await thief.listen("fed.>", ">", f"fed.{RUN}.update.>", UPDATE, "$JS.>", "_INBOX.>")
    await send_another(bus, message_id)
    apis = ("$JS.API", "$JS.north.API", "$JS.hub.API", permissions.UPLINK_API)
    await asyncio.gather(*(thief.ask(*request) for api in apis for request in asked_of(api, UPDATES)))
    assert not thief.seen()


async def aggregates_are_there(bus: ConnectedBus) -> bool:
    head = subjects.head(subjects.aggregate(RUN, "north"))
    return await bus.uplinks["north"].follow(AGGREGATES, [head]).__anext__() is not None


async def test_the_probe_sees_the_update_with_the_aggregators_key(bus: ConnectedBus) -> None:
    name = permissions.user_name("aggregator", "north")
    async with prober(bus.servers.aggregator("north"), name) as owner:
        assert await owner.ask(f"$JS.API.DIRECT.GET.{UPDATES}.{UPDATE}", None) == SECRET
        assert owner.seen()


async def test_the_coordinators_key_reads_no_update(bus: ConnectedBus) -> None:
    async with prober(bus.servers.coordinator(), permissions.user_name("coordinator", HUB)) as thief:
        await assert_nothing_got(thief, bus, "coordinator")


async def test_the_uplinks_key_reads_no_update(bus: ConnectedBus) -> None:
    async with prober(bus.servers.uplink("north"), permissions.user_name("uplink", "north")) as thief:
        await assert_nothing_got(thief, bus, "uplink")


async def test_another_sites_key_reads_no_update(bus: ConnectedBus) -> None:
    async with prober(bus.servers.site("north", "b"), permissions.user_name("site", "b")) as thief:
        await assert_nothing_got(thief, bus, "site")


async def test_a_site_cannot_take_others_for_absent(bus: ConnectedBus) -> None:
    """A site tries the header that empties a stream, on a bucket that an older release made."""
    region, bucket, own = bus.aggregators["north"], streams.presence(RUN), subjects.presence_key("site", "b")
    stream = f"KV_{bucket.name}"
    config = (await region._connection.api(f"STREAM.INFO.{stream}"))["config"]
    await region._connection.api(f"STREAM.UPDATE.{stream}", {**config, "allow_rollup_hdrs": True})
    assert not await region.ensure_bucket(bucket)
    await bus.sites["a"].put(bucket.name, subjects.presence_key("site", "a"), b"{}")
    async with prober(bus.servers.site("north", "b"), permissions.user_name("site", "b")) as thief:
        for scope in ("all", "sub"):
            message = await thief.client.request(
                f"$KV.{bucket.name}.{own}", b"{}", headers={"Nats-Rollup": scope}, timeout=ANSWER_S
            )
            assert "rollup not permitted" in str(json.loads(message.data)["error"])
        await bus.sites["b"].put(bucket.name, own, b"{}")
    assert (await region.entries(bucket.name)).keys() >= {"site.a", "site.b"}


async def test_an_observers_key_sees_figures_but_no_message(bus: ConnectedBus) -> None:
    async with prober(bus.servers.observer("north"), permissions.user_name("observer", "north")) as watcher:
        info = await watcher.ask(f"$JS.API.STREAM.INFO.{UPDATES}", {})
        assert isinstance(info, dict)
        assert info["state"]
        with contextlib.suppress(nats.errors.Error):
            await watcher.listen("fed.>", ">", UPDATE)
        await send_another(bus, "observer")
        await asyncio.gather(*(watcher.ask(*request) for request in asked_of("$JS.API", UPDATES)))
        assert not any(SECRET in data for data in watcher.heard + watcher.answers)


async def test_the_coordinators_key_cannot_change_a_regions_aggregates(bus: ConnectedBus) -> None:
    assert await aggregates_are_there(bus)
    async with prober(bus.servers.coordinator(), permissions.user_name("coordinator", HUB)) as thief:
        apis = ("$JS.API", "$JS.north.API", "$JS.hub.API")
        requests = [request for api in apis for request in asked_of(api, AGGREGATES, reads=False)]
        assert all(await asyncio.gather(*(thief.harmless(*request) for request in requests)))
    assert await aggregates_are_there(bus)


async def test_the_positive_control_can_purge_its_own_aggregates(bus: ConnectedBus) -> None:
    prefix = subjects.aggregate(RUN, "north")
    await bus.uplinks["north"].publish(subjects.chunk(prefix, "old", 0), b"old", message_id="old.0")
    await bus.uplinks["north"].purge(AGGREGATES, subjects.chunks(prefix, "old"))
    assert await bus.uplinks["north"].last(AGGREGATES, subjects.chunk(prefix, "old", 0)) is None


@with_leaves
async def test_a_consumer_made_at_the_hub_cannot_be_turned_against_a_region(bus: ConnectedBus) -> None:
    """A push consumer delivers to the subject its maker chose, with the server's rights: here a region's JetStream."""
    inbox = subjects.inbox_stream(RUN, HUB, "north")
    async with prober(bus.servers.coordinator(), permissions.user_name("coordinator", HUB)) as thief:
        for subject, _ in asked_of("$JS.north.API", AGGREGATES, reads=False):
            config = {"ack_policy": "none", "deliver_policy": "all", "deliver_subject": subject}
            await thief.ask(f"$JS.API.CONSUMER.CREATE.{inbox}", {"stream_name": inbox, "config": config})
        await bus.uplinks["north"].publish(subjects.head(subjects.aggregate(RUN, "north")), b"next", message_id="next")

        async def arrived() -> bool:
            record = await bus.coordinator.last(inbox, subjects.head(subjects.aggregate(RUN, "north")))
            return record is not None and record.data == b"next"

        await until(arrived)
    assert await aggregates_are_there(bus)


@with_leaves
async def test_the_links_key_is_no_clients_key(bus: ConnectedBus, tmp_path: Path) -> None:
    name = permissions.user_name("link", "north")
    seed = tmp_path / "link.nk"
    seed.write_text(seed_in(bus.servers.kits.seed_file(name)))
    settings = bus.servers.user("observer", HUB).model_copy(update={"nkey_seed_file": seed})
    with pytest.raises(nats.errors.Error, match="Authorization"):
        async with asyncio.timeout(5), prober(settings, name):
            pass


def seed_in(link_conf: Path) -> str:
    return link_conf.read_text().split('"')[1]


@with_leaves
async def test_a_rogue_leaf_with_the_links_key_reaches_no_other_regions_streams(
    bus: ConnectedBus, tmp_path: Path
) -> None:
    """An attacker with the kit of south runs his own server, with a user who may do everything there."""
    models = subjects.models_for_stream(RUN, "south")
    name = permissions.user_name("uplink", "south")
    async with rogue_leaf(bus, "south", tmp_path) as settings, prober(settings, name) as thief:

        async def linked() -> bool:
            answer = await thief.ask(
                f"$JS.hub.API.CONSUMER.CREATE.{models}", {"stream_name": models, "config": {"ack_policy": "none"}}
            )
            return isinstance(answer, dict) and "created" in answer

        await until(linked)
        await thief.listen("$JS.S.*", "$JS.M.*", "fed_deliver.>", f"{permissions.deliver('north')}.S.*")
        head = subjects.head(subjects.aggregate(RUN, "north"))
        await bus.uplinks["north"].publish(head, b"sum of north", message_id="rogue listens")

        async def copied() -> bool:
            record = await bus.coordinator.last(subjects.inbox_stream(RUN, HUB, "north"), head)
            return record is not None and record.data == b"sum of north"

        await until(copied)
        assert b"sum of north" not in thief.heard
        await assert_nothing_got(thief, bus, "rogue")
        targets = ((AGGREGATES, "$JS.north.API"), (models, "$JS.hub.API"))
        requests = [request for stream, api in targets for request in asked_of(api, stream, reads=False)]
        assert all(await asyncio.gather(*(thief.harmless(*request) for request in requests)))
    assert await aggregates_are_there(bus)


async def test_a_hub_that_allows_everything_still_cannot_change_a_region(tmp_path: Path) -> None:
    """The hub's operator has removed all limits; the region's own configuration still holds."""
    kits, ports = Kits(tmp_path), {node: Ports(3) for node in (HUB, "north")}
    at = {node: dict(zip(("port", "leaf_port", "monitor_port"), ports[node].numbers, strict=True)) for node in ports}
    plan = plan_of(RegionPlan("north", ("a", "b"), bus=LeafAddress(**at["north"])), bus=at[HUB])
    await asyncio.to_thread(provision, plan, tmp_path)
    registry = Registry.read(kits.authority / "registry.toml", RUN)
    assert registry is not None
    everything = Permissions(publish=(">",), subscribe=(">",))
    root, link = (
        User(name, registry.keys[name], everything, leaf="link" in name) for name in ("coordinator.hub", "link.north")
    )
    (kits.server(HUB) / "accounts.conf").write_text(sharing.render([BusAccount(accounts.HUB_ACCOUNT, (root, link))]))
    above, below = (NatsServer(plan.server(node), kits.server(node), ports[node]) for node in ports)
    uplink, ca_file = "uplink.north", kits.server(HUB) / CA_FILE
    region = BusSettings(url=below.url, ca_file=ca_file, nkey_seed_file=kits.seed_file(uplink))
    hub = BusSettings(url=above.url, ca_file=ca_file, nkey_seed_file=kits.seed_file(root.name))
    async with above, below, Bus.connect(region, uplink) as owner, prober(hub, root.name) as thief:
        await owner.ensure_stream(streams.at_uplink(RUN, "north")[1])
        head = subjects.head(subjects.aggregate(RUN, "north"))
        await owner.publish(head, b"sum", message_id="sum")

        async def reaches_the_region() -> bool:
            config = {"ack_policy": "none", "deliver_subject": "stolen.here"}
            create = f"$JS.north.API.CONSUMER.CREATE.{AGGREGATES}"
            answer = await thief.ask(create, {"stream_name": AGGREGATES, "config": config})
            return isinstance(answer, dict) and "created" in answer

        await until(reaches_the_region)
        requests = asked_of("$JS.north.API", AGGREGATES, reads=False)
        assert all(await asyncio.gather(*(thief.harmless(*request) for request in requests)))
        kept = await owner.last(AGGREGATES, head)
        assert kept is not None

        # A push consumer delivers with the server's own rights, here to the region's JetStream.
        create = f"$JS.north.API.CONSUMER.CREATE.{AGGREGATES}"
        for api in ("$JS.API", "$JS.north.API"):
            target = {
                "ack_policy": "none",
                "headers_only": True,
                "deliver_subject": f"{api}.STREAM.DELETE.{AGGREGATES}",
            }
            await thief.ask(create, {"stream_name": AGGREGATES, "config": target})
        await owner.publish(head, b"next sum", message_id="next")
        record = await owner.last(AGGREGATES, head)
        assert record is not None
        assert (record.data, record.sequence) == (b"next sum", kept.sequence + 1)


async def test_a_site_may_send_only_as_itself(bus: ConnectedBus) -> None:
    site = bus.sites["b"]
    own = subjects.head(subjects.update(RUN, "north", "b"))
    await site.publish(own, b"mine", message_id="own")
    await site.put(subjects.presence_bucket(RUN), subjects.presence_key("site", "b"), b"here")
    refused = [
        UPDATE,
        subjects.evaluation(RUN, "north", "a"),
        subjects.head(subjects.update(RUN, "south", "c")),
        subjects.head(subjects.aggregate(RUN, "north")),
        subjects.head(subjects.model(RUN)),
        subjects.control(RUN),
    ]
    for subject in refused:
        with pytest.raises(BusError, match="may not publish"):
            await site.publish(subject, b"forged", message_id="forged")
    with pytest.raises(BusError, match="may not publish"):
        await site.put(subjects.presence_bucket(RUN), subjects.presence_key("site", "a"), b"forged")
    record = await bus.aggregators["north"].last(UPDATES, UPDATE)
    assert record is not None
    assert record.data == SECRET
