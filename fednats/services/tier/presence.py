"""Track which sites and regions below are present, from the presence keys that they renew on the bus."""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Protocol

from pydantic import ValidationError

from fednats import subjects
from fednats.messages import Presence
from fednats.permissions import user_name
from fednats.protocol.events import Event, PresenceChanged
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.notices import What
from fednats.transport.bus import Bus

PAUSE_S = 1.0
"""Pause after each change of attendance. Changes are journalled, so this limits what a flapping service writes."""


class PresenceMachine(Protocol):
    """A machine that is told which sources are present."""

    @property
    def present(self) -> frozenset[str]:
        """Sources that it takes to be present."""

    @property
    def short_of_sites(self) -> bool:
        """Whether too few sources are present to make a sum."""


class Attendance:
    """Attendance of everything that reports to a node: sites in its region's account, regions in its uplink's.

    The machine learns of a change only once it is journalled. `Attendance` remembers what it has fed already, so that
    changes in two roles at the same time do not undo each other.
    """

    def __init__(self, daemon: Daemon, machine: PresenceMachine, feed: Callable[[Event], Awaitable[None]]) -> None:
        """Tell ``machine`` through ``feed``. While it is short of sites, the daemon's own presence says so."""
        self._daemon = daemon
        self._machine = machine
        self._feed = feed
        self._watched: dict[str, frozenset[str]] = {}
        self._there: dict[str, frozenset[str]] = {}
        self._told: frozenset[str] | None = None
        daemon.waits = lambda: machine.short_of_sites

    async def watch(self, bus: Bus, role: str, names: tuple[str, ...]) -> None:
        """Tell the machine which of its sources ``names``, services of ``role``, are present, forever."""
        async for entries in bus.watch(subjects.presence_bucket(self._daemon.run)):
            said = {name: said_by(role, name, entries.get(subjects.presence_key(role, name))) for name in names}
            there = _note(self._daemon, role, said)
            before, self._there[role], self._watched[role] = self._there.get(role), there, frozenset(names)
            if before is None:
                self._daemon.log.info("sources_present", present=sorted(there), absent=sorted(said.keys() - there))
            else:
                _log_changes(self._daemon, before, there)
            await self._tell()

    async def _tell(self) -> None:
        watched = frozenset[str]().union(*self._watched.values())
        present = (self._machine.present - watched).union(*self._there.values())
        self._daemon.metrics.present.set(len(present))
        if present != (self._machine.present if self._told is None else self._told):
            self._told = present
            await self._feed(PresenceChanged(present=tuple(sorted(present))))
            await asyncio.sleep(PAUSE_S)


def _note(daemon: Daemon, role: str, said: Mapping[str, Presence | None]) -> frozenset[str]:
    """Note the presence of the services of ``role``; return those that are present and not waiting."""
    there = frozenset(name for name, presence in said.items() if presence is not None and not presence.waits)
    waiting = frozenset(name for name, presence in said.items() if presence is not None and presence.waits)
    absent = said.keys() - there - waiting
    daemon.sources[role] = {"present": sorted(there), "waiting": sorted(waiting), "absent": sorted(absent)}
    daemon.metrics.sources_present(role, {name: name not in absent for name in said})
    note_said(daemon, role, list(said.values()))
    return there


def said_by(role: str, name: str, value: bytes | None) -> Presence | None:
    """Return a service's presence, cut to what it may speak for; None if it is absent or malformed.

    A site may speak only for itself. A region that names more failing sites than it has is believed about none.
    """
    try:
        presence = None if value is None else Presence.model_validate_json(value)
    except ValidationError:
        return None
    if presence is None:
        return None
    if role == "site":
        own = {user_name(role, name)}
        declined = {who: why for who, why in presence.declined.items() if who in own}
        failing = {who: why for who, why in presence.failing.items() if who in own}
        n_sites = min(presence.n_sites, 1)
        return presence.model_copy(update={"declined": declined, "failing": failing, "n_sites": n_sites})
    too_many = 0 < presence.n_sites < len(presence.failing)
    return presence.model_copy(update={"failing": {}}) if too_many else presence


def note_said(daemon: Daemon, role: str, said: Collection[Presence | None]) -> None:
    """Note which services decline, which fail, and how many sites there are, from all presences of ``role``."""
    there = [presence for presence in said if presence is not None]
    declined = {name: why for presence in there for name, why in presence.declined.items()}
    failing = {name: why for presence in there for name, why in presence.failing.items()}
    _log_new(daemon, "takes_no_part", daemon.declined.get(role, {}), declined)
    _log_new(daemon, "fails_to_train", daemon.failing.get(role, {}), failing)
    daemon.declined[role], daemon.failing[role] = declined, failing
    daemon.metrics.declined.set(sum(map(len, daemon.declined.values())))
    daemon.metrics.failing.set(sum(map(len, daemon.failing.values())))
    counts = [presence.n_sites for presence in there]
    daemon.n_sites[role] = sum(counts) if all(counts) and len(there) == len(said) else 0


def _log_new(daemon: Daemon, event: str, before: Mapping[str, str], now: Mapping[str, str]) -> None:
    for name, why in now.items():
        if before.get(name) != why:
            daemon.log.warning(event, service=name, why=why)


def _log_changes(daemon: Daemon, before: frozenset[str], now: frozenset[str]) -> None:
    for name in sorted(now - before):
        daemon.log.info("source_joined", source=name)
        daemon.notices.add(What.SOURCE_JOINED, {"source": name})
    for name in sorted(before - now):
        daemon.log.warning("source_left", source=name)
        daemon.notices.add(What.SOURCE_LEFT, {"source": name})
