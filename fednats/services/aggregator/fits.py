"""What contributions look like, by the version at which they are added: the settings of a run may change in its course.

The worker says it of the newest version's settings. A combination that was begun at an earlier version, and is made after a
restart or beside a newer announcement, is made by the settings that were announced with its own version.
"""

import asyncio
from dataclasses import replace

from fednats.protocol.events import Event, VersionAnnounced
from fednats.services.daemon.answers import Fit

KEPT = 64
"""Announcements that are remembered: more versions than a combination takes."""


class Fits:
    """The fits of one region."""

    def __init__(self) -> None:
        self._newest: Fit | None = None
        self._first_version = 0
        """Of the run that the newest is for."""
        self._known = asyncio.Event()
        self._announced: dict[int, VersionAnnounced] = {}

    def note(self, event: Event) -> None:
        """Remember what was announced, now or before a restart."""
        if isinstance(event, VersionAnnounced):
            self._announced[event.version] = event
            while len(self._announced) > KEPT:
                del self._announced[next(iter(self._announced))]

    def take(self, fit: Fit, first_version: int) -> None:
        """Take what the worker says of the newest version, of a run that began with ``first_version``."""
        self._newest, self._first_version = fit, first_version
        self._known.set()

    async def at(self, version: int) -> Fit | None:
        """Return what is added at ``version``; None if another run, or another packing of deltas, has begun since.

        After a restart it waits until a model is seen again.
        """
        await self._known.wait()
        fit, announced = self._newest, self._announced.get(version)
        if fit is None or version < self._first_version:
            return None
        if announced is None:
            return fit
        then = (announced.n_chunks, announced.max_total_weight, announced.capacity)
        if then != (fit.n_chunks, fit.max_total_weight, fit.capacity):
            return None
        return replace(fit, aggregation=announced.settings)
