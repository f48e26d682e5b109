"""What a peer says of itself is bounded, and counts for what is its own."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import cast

import pytest
import structlog

from fednats.messages import Presence
from fednats.protocol.events import Event, PresenceChanged
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.tier import presence as service
from fednats.services.tier.presence import Attendance, note_said, said_by
from fednats.transport.bus import Bus

LIES = Presence(
    release="0",
    declined={f"site.{name}": "no" for name in "abc"},
    failing={f"site.{name}": "raises" for name in "abc"},
    n_sites=2**40,
)


def test_a_site_speaks_for_itself_alone() -> None:
    said = said_by("site", "a", LIES.model_dump_json().encode())
    assert said is not None
    assert (said.declined, said.failing, said.n_sites) == ({"site.a": "no"}, {"site.a": "raises"}, 1)


def test_a_region_cannot_say_that_more_sites_fail_than_it_has() -> None:
    """The run ends when as many fail as there are: one region could so end it for all."""
    said = said_by("aggregator", "north", LIES.model_copy(update={"n_sites": 2}).model_dump_json().encode())
    assert said is not None
    assert said.failing == {}
    honest = LIES.model_copy(update={"n_sites": 3})
    assert said_by("aggregator", "north", honest.model_dump_json().encode()) == honest
    unknown = LIES.model_copy(update={"n_sites": 0})
    assert said_by("aggregator", "north", unknown.model_dump_json().encode()) == unknown


def test_what_is_no_presence_is_none() -> None:
    assert said_by("site", "a", None) is None
    assert said_by("site", "a", b"{") is None


def test_sites_that_say_much_do_not_silence_their_region() -> None:
    """A region's presence has what its sites say, and must fit into one key."""
    daemon = Daemon("aggregator", "north", "r", structlog.get_logger())
    said = [
        Presence(
            release="0", declined={f"site.{i}": "\N{SNOWMAN}" * 1000}, failing={f"site.{i}": "x" * 1000}, n_sites=1
        )
        for i in range(100)
    ]
    note_said(daemon, "site", said)
    presence = daemon.presence
    assert len(presence.model_dump_json().encode()) < 2**15
    assert (len(presence.failing), presence.n_sites) == (100, 100)
    note_said(daemon, "site", said[:3])
    assert len(daemon.presence.failing["site.0"]) == 1000, "where few say something, nothing is cut"


class SlowMachine:
    """A machine that has been told and has not taken note yet, as while its journal is written."""

    present: frozenset[str] = frozenset()
    short_of_sites = False


class OneState:
    """A bus on which a bucket is what it is, for ever."""

    def __init__(self, key: str) -> None:
        self._key = key

    async def watch(self, _bucket: str) -> AsyncIterator[Mapping[str, bytes]]:
        yield {self._key: Presence(release="0").model_dump_json().encode()}
        await asyncio.Event().wait()


async def test_roles_that_change_at_once_are_both_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with sites and regions below it watches two buckets; neither erases what the other has seen."""
    monkeypatch.setattr(service, "PAUSE_S", 0.0)
    told: list[Event] = []

    async def feed(event: Event) -> None:
        told.append(event)

    attendance = Attendance(Daemon("aggregator", "europe", "r", structlog.get_logger()), SlowMachine(), feed)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        watching = [
            group.create_task(attendance.watch(cast(Bus, OneState("site.a")), "site", ("a", "b"))),
            group.create_task(attendance.watch(cast(Bus, OneState("aggregator.north")), "aggregator", ("north",))),
        ]
        while len(told) < len(watching):  # noqa: ASYNC110 -- the machine has no event
            await asyncio.sleep(0)
        for task in watching:
            task.cancel()
    assert told == [PresenceChanged(present=("a",)), PresenceChanged(present=("a", "north"))]
