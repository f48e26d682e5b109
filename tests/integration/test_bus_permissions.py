"""Every user tries every subject and every JetStream request that is not its own, as an attacker would.

The tests enumerate the federation's subjects, streams and requests. With plain nats-py and a user's key, they publish
and subscribe to all that the matrix in bus/README.md (`fednats.permissions`) does not allow the user. The server must
deny each.
"""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import product

import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from fednats import permissions, subjects
from fednats.config import BusSettings
from fednats.permissions import User
from fednats.provision import accounts
from fednats.provision.authority import CA_FILE
from fednats.provision.kits import provisioned
from fednats.provision.plan import RegionPlan
from fednats.provision.registry import Registry
from fednats.subjects import HUB
from tests.plain_client import plain_client
from tests.support.connected_bus import ConnectedBus, connected_bus

pytestmark = pytest.mark.asyncio(loop_scope="module")

RUN = "run"
PLAN = (RegionPlan("europe", ("e",)), RegionPlan("north", ("a", "b"), parent="europe"), RegionPlan("south", ("c",)))
FLAT = (RegionPlan("north", ("a", "b")), RegionPlan("south", ("c",)))
NODES = (HUB, "europe", "north", "south")
SITES = {"a": "north", "b": "north", "c": "south", "e": "europe"}
UPDATES = {site: subjects.updates_stream(RUN, region, site) for site, region in SITES.items()}

OF_STREAM = (
    *(f"STREAM.{verb}" for verb in ("CREATE", "UPDATE", "INFO", "DELETE", "PURGE", "SNAPSHOT", "RESTORE")),
    *(f"STREAM.{verb}" for verb in ("MSG.GET", "MSG.DELETE", "PEER.REMOVE", "LEADER.STEPDOWN")),
    "DIRECT.GET",
    "CONSUMER.CREATE",
    "CONSUMER.NAMES",
    "CONSUMER.LIST",
)
OF_CONSUMER = (
    *(f"CONSUMER.{verb}" for verb in ("CREATE", "DURABLE.CREATE", "INFO", "DELETE", "MSG.NEXT", "PAUSE", "RESET")),
    *(f"CONSUMER.{verb}" for verb in ("UNPIN", "LEADER.STEPDOWN")),
)
OF_SERVER = ("INFO", "ACCOUNT.PURGE.HUB", "META.LEADER.STEPDOWN", "SERVER.REMOVE", "STREAM.NAMES", "STREAM.LIST")

NEVER: dict[str, tuple[str, ...]] = {
    "site": (
        "fed.run.model.>",
        "fed.run.control",
        "fed.run.order",
        "fed.run.aggregate.>",
        "fed.run.reject.>",
        "fed.run.receipt.>",
        "fed.run.pulse.>",
        "$KV.fed_run_state.>",
        "$JS.ACK.>",
        "$JS.API.STREAM.>",
        "$JS.API.CONSUMER.>",
        "$JS.north.>",
        "$JS.hub.>",
        "fed.run.holder.>",
        "fed.run.composition.>",
    ),
    "aggregator": (
        "fed.run.order",
        "fed.run.update.>",
        "fed.run.model.>",
        "fed.run.aggregate.>",
        "fed.run.control",
        "$JS.hub.>",
    ),
    "uplink": (
        "fed.run.order",
        "fed.run.receipt.>",
        "fed.run.update.>",
        "fed.run.evaluation.*.*",
        "fed.run.model.>",
        "fed.run.control",
    ),
    "coordinator": (
        "fed.run.receipt.>",
        "fed.run.update.>",
        "fed.run.aggregate.>",
        "fed.run.evaluation.*.*",
        "$JS.north.>",
        "$JS.south.>",
    ),
    "observer": (
        "fed.run.order",
        "fed.run.update.>",
        "fed.run.model.>",
        "fed.run.control",
        "fed.run.aggregate.>",
        "$KV.>",
        "$JS.ACK.>",
    ),
}
"""Subjects that no user of a role may publish, whatever the matrix says; written by hand."""

NEVER_ANYBODY = (
    "$JS.API.STREAM.DELETE.>",
    "$JS.API.STREAM.SNAPSHOT.>",
    "$JS.API.STREAM.RESTORE.>",
    "$JS.API.STREAM.MSG.DELETE.>",
    "$JS.API.CONSUMER.DURABLE.>",
    "$JS.API.CONSUMER.DELETE.>",
    "$JS.API.ACCOUNT.>",
    "$JS.API.META.>",
    "$JS.API.SERVER.>",
    "$SYS.>",
)


def streams() -> list[str]:
    kinds = (
        subjects.models_stream,
        subjects.receipts_stream,
        subjects.aggregates_stream,
    )
    buckets = (subjects.presence_bucket(RUN), subjects.state_bucket(RUN))
    own = (subjects.compositions_stream, subjects.rejects_stream)
    made = [kind(RUN, node) for kind, node in product((*kinds, *own), NODES)]
    made += [subjects.updates_stream(RUN, region, site) for site, region in SITES.items()]
    made += [subjects.inbox_stream(RUN, node, region) for node, region in product(NODES, NODES) if node != region]
    return [*made, *(f"KV_{bucket}" for bucket in buckets)]


def own_subjects() -> list[str]:
    """Return the subjects of the run, one of each kind for each participant."""
    prefixes = [subjects.model(RUN), *(subjects.aggregate(RUN, node) for node in NODES)]
    prefixes += [subjects.update(RUN, region, site) for site, region in SITES.items()]
    found = [subject for p in prefixes for subject in (subjects.head(p), subjects.chunk(p, "id", 0))]
    found += [subjects.control(RUN), subjects.run_order(RUN)]
    found += [subjects.lease(p) for p in (subjects.model(RUN), *(subjects.aggregate(RUN, node) for node in NODES))]
    found += [subjects.evaluation(RUN, region, site) for site, region in SITES.items()]
    found += [subjects.receipt(RUN, region, site) for site, region in SITES.items()]
    found += [subjects.evaluation_sum(RUN, node) for node in NODES]
    found += [subjects.pulse(RUN, node) for node in NODES]
    found += [subjects.composition(RUN, node, "id") for node in NODES]
    found += [subjects.reject(RUN, node, "a", "malformed") for node in NODES]
    who = [("site", site) for site in SITES] + [("aggregator", node) for node in NODES] + [("coordinator", HUB)]
    found += [subjects.event(RUN, role, name) for role, name in who]
    found += [subjects.status(RUN, role, name) for role, name in who]
    found += [subjects.holder(RUN, role, name) for role, name in who]
    found += [f"$KV.{subjects.presence_bucket(RUN)}.{subjects.presence_key(role, name)}" for role, name in who]
    return [*found, f"$KV.{subjects.state_bucket(RUN)}.anything", *(f"{permissions.deliver(n)}.S.x" for n in NODES)]


def published() -> list[str]:
    """Return all subjects, and all requests to every JetStream."""
    apis = ["$JS.API", permissions.UPLINK_API, *(f"$JS.{node}.API" for node in NODES)]
    found = own_subjects()
    for api, stream in product(apis, streams()):
        found += [f"{api}.{verb}.{stream}" for verb in OF_STREAM]
        found += [f"{api}.{verb}.{stream}.thief" for verb in OF_CONSUMER]
        found += [f"{api}.CONSUMER.CREATE.{stream}.thief.fed.run.x", f"{api}.DIRECT.GET.{stream}.fed.run.x"]
    found += [f"{api}.{verb}" for api, verb in product(apis, OF_SERVER)]
    found += [f"$JS.{node}.API.{subject}" for node in NODES for subject in found if subject.startswith("$KV.")]
    for stream in streams():
        found += [f"$JS.ACK.{stream}.thief.1.1.1.1.0", f"$JS.FC.{stream}.x.y"]
    found += ["$SYS.REQ.SERVER.PING", "$SYS.REQ.ACCOUNT.HUB.CONNZ", "$SRV.PING", "$O.bucket.M.x", "$JSC.R.x", "$JS.S.x"]
    return [
        *found,
        *(f"{permissions.inbox(name)}.x" for name in ("site.a", "coordinator.hub", "uplink.north")),
        "other",
    ]


def heard() -> list[str]:
    """Return all subjects, and the wildcards that an attacker would try."""
    nets = [">", "*", "*.>", "fed.>", "fed.*.>", f"fed.{RUN}.>", f"fed.{RUN}.*.>", f"fed.{RUN}.update.>", "$JS.>"]
    nets += [
        "$JS.API.>",
        "$JS.ACK.>",
        "$JS.EVENT.>",
        "$JS.S.>",
        "$JS.M.>",
        "$JSC.>",
        "$KV.>",
        "$SYS.>",
        "_INBOX.>",
        "_R_.>",
    ]
    nets += [f"{permissions.inbox(name)}.>" for name in ("site.a", "site.b", "aggregator.north", "uplink.north")]
    nets += ["_INBOX.coordinator.hub.>", "fed_deliver.>", *(f"fed.{RUN}.reject.{node}.>" for node in NODES)]
    nets += [f"fed.{RUN}.update.{node}.>" for node in NODES] + [f"fed.{RUN}.evaluation.{node}.*" for node in NODES]
    return [*nets, *own_subjects()]


def covers(pattern: str, subject: str) -> bool:
    """Return whether ``pattern`` matches everything that ``subject``, possibly with wildcards, matches."""
    wanted = subject.split(".")
    for position, part in enumerate(pattern.split(".")):
        if part == ">":
            return position < len(wanted)
        if position >= len(wanted) or wanted[position] == ">" or part not in {"*", wanted[position]}:
            return False
    return len(wanted) == len(pattern.split("."))


def outside(allowed: Iterable[str], universe: Sequence[str]) -> set[str]:
    patterns = tuple(allowed)
    return {subject for subject in universe if not any(covers(pattern, subject) for pattern in patterns)}


@dataclass
class Denials:
    """The server's denials, in its own words: ``... violation for publish to "subject"``."""

    words: list[str] = field(default_factory=list)

    async def note(self, error: Exception) -> None:
        self.words.append(str(error).casefold())

    def of(self, verb: str, universe: Iterable[str]) -> set[str]:
        quoted = {part.split('"')[1] for part in self.words if f"violation for {verb}" in part}
        return {subject for subject in universe if subject.casefold() in quoted}


@dataclass(frozen=True)
class Member:
    """A bus user, with its server and its seed."""

    user: User
    settings: BusSettings
    domain: str


def members(bus: ConnectedBus) -> list[Member]:
    """Return all users in the kits' accounts who may connect as a client."""
    kits = bus.servers.kits
    plan, registry = provisioned(kits), Registry.read(kits.authority / "registry.toml", RUN)
    assert registry is not None
    at = {HUB: accounts.of_hub(plan, registry)}
    if plan.leaves:
        at |= {region.name: accounts.of_leaf(plan, region, registry) for region in plan.regions}
    return [
        Member(user, settings_of(bus, node, user.name), node)
        for node, its_accounts in at.items()
        for user in its_accounts.users
        if not user.leaf
    ]


def settings_of(bus: ConnectedBus, node: str, user: str) -> BusSettings:
    kits = bus.servers.kits
    return BusSettings(
        url=bus.servers.node(node).url, ca_file=kits.server(HUB) / CA_FILE, nkey_seed_file=kits.seed_file(user)
    )


@asynccontextmanager
async def attacker(member: Member) -> AsyncIterator[tuple[Client, Denials]]:
    denials = Denials()
    async with plain_client(member.settings, error_cb=denials.note, allow_reconnect=False) as client:
        yield client, denials


async def settled(client: Client) -> None:
    """Return when the server has answered all messages; nats-py's first ping overtakes messages not yet sent."""
    await client.flush(timeout=30)
    await client.flush(timeout=30)


async def ignore(_message: Msg) -> None:
    pass


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[True, False], ids=["leaves", "no-leaves"])
async def bus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ConnectedBus]:
    plan = PLAN if request.param else FLAT
    async with connected_bus(tmp_path_factory.mktemp("bus"), RUN, plan, leaves=request.param) as connected:
        yield connected


async def test_everything_that_is_not_a_users_own_is_denied(bus: ConnectedBus) -> None:
    everybody = members(bus)
    assert {member.user.name.split(".")[0] for member in everybody} == set(NEVER)
    for member in everybody:
        allowed, own_api = member.user.permissions, f"$JS.{member.domain}.API."
        publish, subscribe = outside(allowed.publish, published()), outside(allowed.subscribe, heard())
        assert len(publish) > 0.97 * len(published())
        async with attacker(member) as (client, denials):
            for subject in subscribe:
                await client.subscribe(subject, cb=ignore)
            for subject in publish:
                if not subject.startswith(own_api):
                    await client.publish(subject, b"forged")
            await settled(client)
            publish = {subject for subject in publish if not subject.startswith(own_api)}
            assert publish - denials.of("publish", publish) == set(), member.user.name
            assert subscribe - denials.of("subscription", subscribe) == set(), member.user.name
        # The server's own domain is another name for its $JS.API; an account with streams gets denials under that name.
        asked = {subject for subject in publish if subject.startswith("$JS.API.")}
        async with attacker(member) as (client, denials):
            other = {own_api + subject.removeprefix("$JS.API."): subject for subject in asked}
            for subject in other:
                await client.publish(subject, b"forged")
            await settled(client)
            denied = denials.of("publish", asked) | {other[subject] for subject in denials.of("publish", other)}
            assert asked - denied == set(), member.user.name


async def test_a_users_own_is_not_denied(bus: ConnectedBus) -> None:
    """Positive control: with the same key and the same kind of request, the connection itself is not denied."""
    for member in members(bus):
        allowed = member.user.permissions
        own = set(heard()) - outside(allowed.subscribe, heard())
        async with attacker(member) as (client, denials):
            for subject in own:
                await client.subscribe(subject, cb=ignore)
            asked = [subject for subject in published() if ".STREAM.INFO." in subject and subject in allowed.publish]
            for subject in asked:
                await client.publish(subject, b"")
            await settled(client)
            assert denials.words == [], member.user.name
            assert own or asked


async def test_the_matrix_gives_nobody_what_must_never_be(bus: ConnectedBus) -> None:
    """Compare the matrix with a list written by hand; the tests above show that the servers enforce the matrix."""
    universe = published()
    for member in members(bus):
        role, _, node = member.user.name.partition(".")
        given = set(universe) - outside(member.user.permissions.publish, universe)
        never = [*NEVER[role], *NEVER_ANYBODY]
        if role == "site":
            region = SITES[node]
            never += [
                p
                for site in SITES
                if site != node
                for p in (
                    f"fed.run.update.*.{site}.>",
                    f"fed.run.evaluation.*.{site}",
                    f"$JS.API.DIRECT.GET.*.fed.run.receipt.*.{site}",
                )
            ]
            never += [f"$JS.API.DIRECT.GET.fed_run_{kind}_{region}.>" for kind in ("rejects", "aggregates")]
            never += [f"$JS.API.DIRECT.GET.{stream}.>" for stream in UPDATES.values()]
            never += [f"$JS.API.DIRECT.GET.fed_run_receipts_{region}"]
        if role in {"aggregator", "uplink"}:
            never += [f"$JS.API.*.*.fed_run_aggregates_{other}" for other in NODES if other != node]
            never += [f"$JS.API.*.*.{stream}" for site, stream in UPDATES.items() if SITES[site] != node]
            never += [
                f"fed.run.{kind}.{other}.>" for kind in ("aggregate", "receipt") for other in NODES if other != node
            ]
            never += [f"$JS.{other}.API.STREAM.>" for other in NODES]
        if role in {"coordinator", "uplink"}:
            never += [f"$JS.API.{verb}" for of in UPDATES.values() for verb in (f"*.*.{of}", f"DIRECT.GET.{of}.>")]
        assert not {subject for subject in given for pattern in never if covers(pattern, subject)}, member.user.name
