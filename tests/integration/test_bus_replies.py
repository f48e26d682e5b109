"""No user can make the server write into others' streams, by a reply subject, a consumer's target or a trace.

A server answers, delivers and traces with its own rights, to any subject it is given. With plain nats-py, every user
except the streams' owners sends everything that it may send. As the place to answer, it names every stored subject and
every request that empties or deletes a stream. Every stored message must then still be the newest of its subject.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Container, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import nats.errors
import pytest
import pytest_asyncio
from nats.aio.client import Client

from fednats import permissions, subjects
from fednats.errors import BusError
from fednats.permissions import Permissions
from fednats.provision.plan import RegionPlan
from fednats.subjects import HUB
from fednats.transport.bus import Bus
from tests.integration.test_bus_security import prober
from tests.rogue_leaf import rogue_leaf
from tests.support.connected_bus import ConnectedBus, connected_bus, until

pytestmark = pytest.mark.asyncio(loop_scope="module")

RUN = "run"
PLAN = (RegionPlan("north", ("a", "b")), RegionPlan("south", ("c",)))
PRESENCE, STATE = subjects.presence_bucket(RUN), subjects.state_bucket(RUN)
MODEL = subjects.model(RUN)
OWN_HEAD = b'{"keep": 0}'
"""Content of an attacker's own message; read as a purge request, it would keep nothing."""


@dataclass
class Stored:
    """One stored message: its place, and a bus that may read it there."""

    reader: Bus
    stream: str
    subject: str
    before: tuple[int, bytes] | None = None

    async def now(self) -> tuple[int, bytes] | None:
        """Return the newest message; None if there is no message or no stream."""
        try:
            record = await self.reader.last(self.stream, self.subject)
        except BusError:
            return None
        return None if record is None else (record.sequence, record.data)

    async def is_there(self) -> bool:
        return await self.now() is not None


@dataclass
class Seeded:
    """A federation with a message on every kind of stored subject."""

    bus: ConnectedBus
    leaves: bool
    stored: list[Stored] = field(default_factory=list)

    async def keep(self, writer: Bus, reader: Bus, stream: str, subject: str, data: bytes = b"true") -> None:
        await writer.publish(subject, data, f"seed {stream} {subject}")
        self.stored.append(Stored(reader, stream, subject))

    async def note(self) -> None:
        """Note the newest message of each subject."""
        for kept in self.stored:
            kept.before = await kept.now()

    async def changed(self, own: Iterable[str]) -> list[str]:
        """Return the messages that differ from those noted, except on the subjects ``own``."""
        others = [kept for kept in self.stored if kept.subject not in own]
        assert others
        return [f"{kept.stream}: {kept.subject}: {now}" for kept in others if (now := await kept.now()) != kept.before]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[True, False], ids=["leaves", "no-leaves"])
async def seeded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Seeded]:
    async with connected_bus(tmp_path_factory.mktemp("bus"), RUN, PLAN, leaves=request.param) as bus:
        made = Seeded(bus, request.param)
        await seed_hub(made)
        for region in PLAN:
            await seed_region(made, region)
        for kept in made.stored:
            await until(kept.is_there)
        yield made


async def seed_hub(made: Seeded) -> None:
    hub, observer = made.bus.coordinator, made.bus.observer
    models = subjects.models_stream(RUN, HUB)
    for subject in (subjects.head(MODEL), subjects.chunk(MODEL, "id", 0), subjects.lease(MODEL), subjects.control(RUN)):
        await made.keep(hub, hub, models, subject)
    composition, reject = subjects.composition(RUN, HUB, "id"), subjects.reject(RUN, HUB, "north", "signature")
    await made.keep(hub, hub, subjects.compositions_stream(RUN, HUB), composition)
    await made.keep(hub, observer, subjects.rejects_stream(RUN, HUB), reject)
    await made.keep(hub, hub, f"KV_{STATE}", f"$KV.{STATE}.run")
    for region in PLAN:
        key = f"$KV.{PRESENCE}.{subjects.presence_key('aggregator', region.name)}"
        await made.bus.uplinks[region.name].put(PRESENCE, f"aggregator.{region.name}", b"true", domain=HUB)
        made.stored.append(Stored(hub, f"KV_{PRESENCE}", key))


async def seed_region(made: Seeded, region: RegionPlan) -> None:
    name, uplink, aggregator = region.name, made.bus.uplinks[region.name], made.bus.aggregators[region.name]
    prefix = subjects.aggregate(RUN, name)
    for subject in (subjects.head(prefix), subjects.lease(prefix)):
        await made.keep(uplink, uplink, subjects.aggregates_stream(RUN, name), subject, OWN_HEAD)
    made.stored.append(Stored(made.bus.coordinator, subjects.inbox_stream(RUN, HUB, name), subjects.head(prefix)))
    compositions = subjects.compositions_stream(RUN, name)
    await made.keep(aggregator, aggregator, compositions, subjects.composition(RUN, name, "id"))
    await made.keep(aggregator, aggregator, f"KV_{STATE}", f"$KV.{STATE}.run")
    models = subjects.models_stream(RUN, name)
    made.stored += [Stored(aggregator, models, subject) for subject in (subjects.head(MODEL), subjects.control(RUN))]
    for site in region.sites:
        member = made.bus.sites[site]
        updates, receipts = subjects.updates_stream(RUN, name, site), subjects.receipts_stream(RUN, name)
        await made.keep(member, aggregator, updates, subjects.head(subjects.update(RUN, name, site)), OWN_HEAD)
        await made.keep(member, aggregator, updates, subjects.evaluation(RUN, name, site))
        await made.keep(aggregator, member, receipts, subjects.receipt(RUN, name, site))
        await made.keep(member, aggregator, f"KV_{PRESENCE}", f"$KV.{PRESENCE}.site.{site}")


# --- the attack -------------------------------------------------------------------------------------------------------


def targets(made: Seeded, own_streams: Container[str]) -> list[str]:
    """Return the subjects to send answers to: every stored subject, and the requests that purge or delete a stream.

    ``own_streams`` are those of the attacker's account. It may purge them, but does not, to keep tests independent.
    """
    wanted = {kept.subject for kept in made.stored}
    for stream, verb in ((s, v) for s in {kept.stream for kept in made.stored} for v in ("PURGE", "DELETE")):
        apis = (f"$JS.{HUB}.API",) if stream in own_streams else ("$JS.API", f"$JS.{HUB}.API")
        wanted |= {f"{api}.STREAM.{verb}.{stream}" for api in apis}
    return sorted(wanted)


def questions(made: Seeded, allowed: Iterable[str]) -> list[str]:
    """Return the requests that a user may send who may publish ``allowed``; reads name a message that exists."""
    known: dict[str, str] = {}
    for kept in made.stored:
        known.setdefault(kept.stream, kept.subject)
    found = []
    for pattern in allowed:
        stream = next((part for part in pattern.split(".") if part in known), "")
        subject = pattern.replace(f"{stream}.>", f"{stream}.{known[stream]}") if stream else pattern
        found.append(".".join({"*": "x", ">": "head"}.get(part, part) for part in subject.split(".")))
    return [subject for subject in found if ".STREAM.PURGE." not in subject]  # it may purge its own streams


async def ask_everything(client: Client, asked: Sequence[str], where: Sequence[str]) -> None:
    """Publish each of ``asked`` with each of ``where`` as the subject for answers, deliveries and traces."""
    for subject in asked:
        stream = subject.split("CONSUMER.CREATE.")[-1].split(".")[0]
        for target in where:
            if "CONSUMER.CREATE" in subject:
                for headers_only in (False, True):
                    name = f"thief{abs(hash((subject, target, headers_only)))}"
                    config = {
                        "name": name,
                        "deliver_subject": target,
                        "ack_policy": "none",
                        "deliver_policy": "all",
                        "headers_only": headers_only,
                    }
                    to = f"{subject.rsplit('.', 1)[0]}.{name}" if subject.endswith(".head") else subject
                    await client.publish(to, json.dumps({"stream_name": stream, "config": config}).encode(), target)
            await client.publish(subject, b"{}", reply=target)
            await client.publish(subject, b"{}", reply=target, headers={"Nats-Trace-Dest": target})
        with suppress(nats.errors.Error):
            await client.flush(timeout=10)


async def attack(
    made: Seeded, client: Client, allowed: Iterable[str], own: Iterable[str], own_streams: Container[str] = ()
) -> list[str]:
    await made.note()
    await ask_everything(client, questions(made, allowed), targets(made, own_streams))
    with suppress(nats.errors.Error):
        await client.flush(timeout=10)
    await asyncio.sleep(0.5)  # time for the server to handle the last requests
    return await made.changed(set(own))


def attackers(made: Seeded) -> dict[str, tuple[Permissions, list[str]]]:
    """Return every kind of user, with the stored subjects that it may write."""
    region = {
        kept.subject for kept in made.stored if ".north" in kept.stream + kept.subject or kept.stream.endswith("_north")
    }
    aggregators = [kept.subject for kept in made.stored if kept.reader is made.bus.aggregators["north"]]
    head = subjects.head(subjects.update(RUN, "north", "a"))
    return {
        "site.a": (
            permissions.site(RUN, "north", "a"),
            [head, subjects.evaluation(RUN, "north", "a"), f"$KV.{PRESENCE}.site.a"],
        ),
        "observer.hub": (permissions.observer(RUN, HUB), []),
        "observer.north": (permissions.observer(RUN, "north"), []),
        "uplink.north": (permissions.uplink(RUN, "north"), [s for s in region if "aggregat" in s]),
        "aggregator.north": (permissions.aggregator(RUN, "north", ["a", "b"]), [*region, *aggregators]),
    }


@pytest.mark.parametrize("who", ["site.a", "observer.hub", "observer.north", "uplink.north", "aggregator.north"])
async def test_no_answer_lands_in_somebody_elses_stream(seeded: Seeded, who: str) -> None:
    role, _, node = who.partition(".")
    allowed, own = attackers(seeded)[who]
    settings = seeded.bus.servers.user(role, "north" if role == "site" else node)
    seed = seeded.bus.servers.kits.seed_file(who)
    settings = settings.model_copy(update={"nkey_seed_file": seed})
    streams = (
        {kept.stream for kept in seeded.stored if kept.subject in own} if role in {"uplink", "aggregator"} else set()
    )
    if role == "uplink":
        streams.add(subjects.models_stream(RUN, node))  # copied from above, and by its aggregator from there
    async with prober(settings, who) as thief:
        assert await attack(seeded, thief.client, allowed.publish, own, streams) == []


async def test_nor_does_what_comes_over_a_leaf_link(seeded: Seeded, tmp_path: Path) -> None:
    """The operator of a region's server may send anything over its link; only the hub's permissions hold there."""
    if not seeded.leaves:
        pytest.skip("there is no link")
    name, models = permissions.user_name("uplink", "south"), subjects.models_for_stream(RUN, "south")
    allowed = permissions.link(RUN, "south", HUB)
    own = [kept.subject for kept in seeded.stored if "south" in kept.stream + kept.subject]
    async with rogue_leaf(seeded.bus, "south", tmp_path) as settings, prober(settings, name) as thief:

        async def linked() -> bool:
            config = {"stream_name": models, "config": {"ack_policy": "none"}}
            answer = await thief.ask(f"$JS.{HUB}.API.CONSUMER.CREATE.{models}", config)
            return isinstance(answer, dict) and "created" in answer

        await until(linked)
        assert await attack(seeded, thief.client, allowed.publish, own) == []
    # It may have ruined its own copy of the models, but not those of others.
    await seeded.bus.coordinator.publish(subjects.control(RUN), b"next", "next")

    async def arrived() -> bool:
        north = await seeded.bus.sites["a"].last(subjects.models_stream(RUN, "north"), subjects.control(RUN))
        return north is not None and north.data == b"next"

    await until(arrived)
