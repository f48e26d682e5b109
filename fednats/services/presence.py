"""Who of those that report here is there, from the presence keys that they renew on the bus."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from pydantic import ValidationError

from fednats import subjects
from fednats.messages import Presence
from fednats.protocol.events import Event, PresenceChanged
from fednats.services.lifecycle import Daemon
from fednats.services.notices import What
from fednats.transport.bus import Bus


class Machine(Protocol):
    """What is told who is there."""

    @property
    def present(self) -> frozenset[str]:
        """Who it takes to be there."""

    @property
    def short_of_sites(self) -> bool:
        """Whether no sum can be made of those who are there."""


async def watch_presence(
    daemon: Daemon,
    machine: Machine,
    feed: Callable[[Event], Awaitable[None]],
    bus: Bus,
    role: str,
    names: tuple[str, ...],
) -> None:
    """Tell ``machine`` which of its sources ``names``, services of ``role``, are there, for ever.

    A node that has sources in two accounts (sites in its region's, regions in its uplink's) watches both. What depends
    on others and is short of them says so by its own presence: nobody above waits for it.
    """
    daemon.waits = lambda: machine.short_of_sites
    watched = frozenset(names)
    seen: frozenset[str] | None = None
    async for entries in bus.watch(subjects.presence_bucket(daemon.run)):
        said = {name: _parsed(entries.get(subjects.presence_key(role, name))) for name in watched}
        there = frozenset(name for name, presence in said.items() if presence is not None and not presence.waits)
        waiting = frozenset(name for name, presence in said.items() if presence is not None and presence.waits)
        absent = watched - there - waiting
        daemon.sources[role] = {"present": sorted(there), "waiting": sorted(waiting), "absent": sorted(absent)}
        daemon.metrics.sources_present(role, {name: name not in absent for name in watched})
        _note_declined(daemon, role, [presence for presence in said.values() if presence is not None])
        if seen is None:
            daemon.log.info("sources_present", present=sorted(there), absent=sorted(watched - there))
        else:
            _log_changes(daemon, seen, there)
        seen = there
        present = (machine.present - watched) | there
        daemon.metrics.present.set(len(present))
        if present != machine.present:
            await feed(PresenceChanged(present=tuple(sorted(present))))


def _parsed(value: bytes | None) -> Presence | None:
    """Return what a service says; None if it is not there, or what it says is no presence."""
    try:
        return None if value is None else Presence.model_validate_json(value)
    except ValidationError:
        return None


def _note_declined(daemon: Daemon, role: str, said: Iterable[Presence]) -> None:
    declined = {name: why for presence in said for name, why in presence.declined.items()}
    before = daemon.declined.get(role, {})
    for name, why in declined.items():
        if before.get(name) != why:
            daemon.log.warning("takes_no_part", service=name, why=why)
    daemon.declined[role] = declined
    daemon.metrics.declined.set(sum(map(len, daemon.declined.values())))


def _log_changes(daemon: Daemon, before: frozenset[str], now: frozenset[str]) -> None:
    for name in sorted(now - before):
        daemon.log.info("source_joined", source=name)
        daemon.notices.add(What.SOURCE_JOINED, {"source": name})
    for name in sorted(before - now):
        daemon.log.warning("source_left", source=name)
        daemon.notices.add(What.SOURCE_LEFT, {"source": name})
