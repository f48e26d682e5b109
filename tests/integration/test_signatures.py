"""Forged, altered and replayed messages over a real server, by a bus user or by the operator of the bus."""

import asyncio
import os
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import nkeys
import pytest
import pytest_asyncio
import structlog
import tomli_w

from fednats import subjects, wire
from fednats.config import AggregationSettings
from fednats.crypto.signing import Signer
from fednats.errors import BusError
from fednats.messages import (
    Message,
    Reject,
    Update,
)
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import Command
from fednats.provision.plan import RegionPlan
from fednats.services.daemon import identity as identities
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.tier.inbox import Inbox
from fednats.services.tier.intake import Intake, of_regions, of_sites
from fednats.services.tier.rejects import Rejects
from fednats.services.tier.tier import Tier
from fednats.storage.journal import Journal
from fednats.subjects import HUB
from fednats.transport.bus import Bus
from tests.makers import aggregate, announcement, evaluation, update
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "r"
PLAN = (RegionPlan("north", ("a", "b")), RegionPlan("south", ("c", "d")))
OF_A = subjects.head(subjects.update(RUN, "north", "a"))
OF_B = subjects.head(subjects.update(RUN, "north", "b"))
OF_NORTH = subjects.head(subjects.aggregate(RUN, "north"))
MODEL = subjects.head(subjects.model(RUN))
SETTINGS = AggregationSettings(goal=10, region_goal=10)

LOG = structlog.get_logger()


@pytest_asyncio.fixture
async def bus(tmp_path: Path) -> AsyncIterator[ConnectedBus]:
    async with connected_bus(tmp_path, RUN, PLAN, leaves=False) as connected:
        yield connected


@dataclass
class Receiver:
    """A region or the hub, which takes in contributions as its daemon does."""

    tier: Tier
    machine: Collector

    async def refused(self, reason: str, count: int) -> None:
        """Wait until ``count`` were refused for ``reason``, and assert that none was for another."""

        async def all_there() -> bool:
            return self.tier.refusals.get(reason, 0) >= count

        await until(all_there)
        assert self.tier.refusals == {reason: count}

    async def buffered(self, count: int) -> None:
        """Wait until the buffer has ``count`` contributions."""

        async def all_there() -> bool:
            return self.machine.n_buffered >= count

        await until(all_there)
        assert self.machine.n_buffered == count


@asynccontextmanager
async def receiving(bus: ConnectedBus, directory: Path, node: str) -> AsyncIterator[Receiver]:
    """Take in the contributions to ``node`` with the services' own inbox, journal, state machine and rejects."""
    role, name = ("coordinator", HUB) if node == HUB else ("aggregator", node)
    daemon = Daemon(role, name, RUN, LOG)
    identity = bus.servers.identity(role, name)
    if node == HUB:
        own, senders = bus.coordinator, of_regions(RUN, HUB, leaves=False)
        roster = Roster(RUN, None, sites=frozenset(), regions=frozenset({"north", "south"}))
    else:
        own, senders = bus.aggregators[node], of_sites(RUN, node)
        roster = Roster(RUN, node, sites=frozenset({"a", "b"}), regions=frozenset())
    machine = Collector(roster, lambda event: event.settings.goal)
    tier = Tier(daemon, Journal(directory / f"{node}.sqlite"), machine, Rejects(own, RUN, node, LOG), lambda _: None)
    inbox = Inbox(own, lambda sender: senders.stream_of(sender).name, RUN, identity, LOG)
    intake = Intake(daemon, inbox, node, senders, tier.take, lambda: 0)
    intake.expect(roster.sources)
    tier.inboxes = {type(update("a")): inbox, type(aggregate("north")): inbox}

    async def no_other(command: Command) -> None:
        raise AssertionError(command)

    async with tier.journalling():
        await tier.replay()
        tier.take_up()
        await tier.feed(announcement(settings=SETTINGS))
        running = [
            asyncio.create_task(intake.run()),
            asyncio.create_task(tier.execute(no_other)),
            asyncio.create_task(identity.follow_signers(LOG)),
        ]
        try:
            yield Receiver(tier, machine)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


async def kept(bus: ConnectedBus, node: str, sender: str, data: bytes, reason: str = "signature") -> Reject:
    """Wait until ``data`` is the newest reject of one sender and reason, as the operator sees it; return the reject."""
    stream, subject = subjects.rejects_stream(RUN, node), subjects.reject(RUN, node, sender, reason)
    async with Bus.connect(bus.servers.observer(node), f"observer.{node}") as observer:

        async def look() -> Reject | None:
            record = await observer.last(stream, subject)
            reject = None if record is None else wire.unpack(record.data, Reject)
            return reject if reject is not None and reject.data == data else None

        reject = await until(look)
    assert reject is not None
    return reject


def signed(bus: ConnectedBus, role: str, node: str, subject: str, message: Message) -> bytes:
    return bus.servers.identity(role, node).sign(subject, message)


def altered(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


async def test_nobody_speaks_for_a_site(bus: ConnectedBus, tmp_path: Path) -> None:
    """Site b tries it with its own user; so does the operator of the bus, here with the user of a."""
    honest = signed(bus, "site", "a", OF_A, update("a"))
    stranger = Signer(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())
    scored = evaluation("a", auc=1.0)
    of_evaluation = subjects.evaluation(RUN, "north", "a")
    async with receiving(bus, tmp_path, "north") as region:
        with pytest.raises(BusError, match="may not publish"):
            await bus.sites["b"].publish(OF_A, signed(bus, "site", "b", OF_A, update("a")), "x")
        await bus.sites["b"].publish(OF_B, honest, "what a signed, from b")
        forged = [
            wire.pack(update("a")),
            signed(bus, "site", "b", OF_A, update("a")),
            signed(bus, "aggregator", "north", OF_A, update("a")),
            signed(bus, "site", "a", OF_B, update("a")),
            stranger.sign(OF_A, wire.pack(update("a"))),
            altered(honest, 20),
            altered(honest, len(honest) - 1),
            honest[:-1],
        ]
        for number, data in enumerate(forged):
            await bus.sites["a"].publish(OF_A, data, f"forged-{number}")
        forged_evaluation = signed(bus, "site", "b", of_evaluation, scored)
        await bus.sites["a"].publish(of_evaluation, forged_evaluation, "evaluation")
        await region.refused("signature", 1 + len(forged) + 1)
        assert region.machine.n_buffered == 0
        assert (await kept(bus, "north", "b", honest)).subject == OF_B
        assert (await kept(bus, "north", "a", forged_evaluation)).subject == of_evaluation
        await bus.sites["a"].publish(OF_A, honest, "honest")
        await region.buffered(1)


async def test_who_has_no_key_does_not_get_onto_the_bus(bus: ConnectedBus, tmp_path: Path) -> None:
    seed = tmp_path / "stranger.nk"
    seed.write_bytes(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER))
    settings = bus.servers.site("north", "a").model_copy(update={"nkey_seed_file": seed})
    with pytest.raises(BusError, match=r"uthorization|check nkey_seed_file"):
        async with Bus.connect(settings, "site.a"):
            pass


def another_of_number(number: int) -> Update:
    head = update("a", number)
    return head.model_copy(
        update={"update_id": "another", "payload": head.payload.model_copy(update={"payload_id": "another"})}
    )


async def test_a_replayed_update_counts_once(bus: ConnectedBus, tmp_path: Path) -> None:
    first, second = (signed(bus, "site", "a", OF_A, update("a", number)) for number in (1, 2))
    other = signed(bus, "site", "a", OF_A, another_of_number(1))
    async with receiving(bus, tmp_path, "north") as region:
        for number, data in enumerate((first, second, first, second, first)):
            await bus.sites["a"].publish(OF_A, data, f"m{number}")
        await bus.sites["a"].publish(OF_A, other, "a number twice")
        await region.refused("replayed", 1)
        await region.buffered(2)
        assert "number 1 is that of update a-1" in (await kept(bus, "north", "a", other, "replayed")).detail
    async with receiving(bus, tmp_path, "north") as region:  # after a restart, its journal knows the numbers
        await bus.sites["a"].publish(OF_A, other, "a number twice, again")
        await region.refused("replayed", 1)
        await region.buffered(2)


async def test_a_revoked_site_is_refused_without_a_restart(
    bus: ConnectedBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identities, "REREAD_S", 0.05)
    async with receiving(bus, tmp_path, "north") as region:
        await bus.sites["a"].publish(OF_A, signed(bus, "site", "a", OF_A, update("a", 1)), "before")
        await region.buffered(1)
        later = bus.servers.identity("site", "a")
        file = bus.servers.signers_file("aggregator", "north")
        roster = tomllib.loads(file.read_text())
        with structlog.testing.capture_logs() as lines:
            revoked = {"site.a": [roster["keys"]["site.a"]]}
            file.write_text(tomli_w.dumps({**roster, "epoch": 2, "revoked": revoked}))

            async def noticed() -> bool:
                return any(line["event"] == "signers_changed" for line in lines)

            await until(noticed)
        after = later.sign(OF_A, update("a", 2))
        await bus.sites["a"].publish(OF_A, after, "after")
        await region.refused("signature", 1)
        assert "site.a is revoked" in (await kept(bus, "north", "a", after)).detail
        assert region.machine.n_buffered == 1


async def test_nobody_speaks_for_a_region(bus: ConnectedBus, tmp_path: Path) -> None:
    async with receiving(bus, tmp_path, HUB) as hub:
        forged = [
            wire.pack(aggregate("north")),
            signed(bus, "aggregator", "south", OF_NORTH, aggregate("north")),
            signed(bus, "site", "a", OF_NORTH, aggregate("north")),
            signed(bus, "coordinator", HUB, OF_NORTH, aggregate("north")),
        ]
        for number, data in enumerate(forged):
            await bus.uplinks["north"].publish(OF_NORTH, data, f"forged-{number}")
        await hub.refused("signature", len(forged))
        assert hub.machine.n_buffered == 0
        await bus.uplinks["north"].publish(
            OF_NORTH, signed(bus, "aggregator", "north", OF_NORTH, aggregate("north")), "h"
        )
        await hub.buffered(1)
        assert (await kept(bus, HUB, "north", forged[-1])).subject == OF_NORTH
