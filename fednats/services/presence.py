"""Who of those that report here is there, from the presence keys that they renew on the bus."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from fednats import subjects
from fednats.protocol.events import Event, PresenceChanged
from fednats.services.lifecycle import WAITING, Daemon
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
        there = frozenset(name for name in watched if _is_there(entries, role, name))
        if seen is None:
            daemon.log.info("sources_present", present=sorted(there), absent=sorted(watched - there))
        else:
            _log_changes(daemon, seen, there)
        seen = there
        present = (machine.present - watched) | there
        daemon.metrics.present.set(len(present))
        if present != machine.present:
            await feed(PresenceChanged(present=tuple(sorted(present))))


def _is_there(entries: Mapping[str, bytes], role: str, name: str) -> bool:
    return entries.get(subjects.presence_key(role, name), WAITING) != WAITING


def _log_changes(daemon: Daemon, before: frozenset[str], now: frozenset[str]) -> None:
    for name in sorted(now - before):
        daemon.log.info("source_joined", source=name)
    for name in sorted(before - now):
        daemon.log.warning("source_left", source=name)
