"""The `Fit` of each version, because a run's settings may change during the run.

The worker gives the `Fit` for the newest version's settings. A combination that began at an earlier version uses the
settings announced with that version, even after a restart or a newer announcement.
"""

import asyncio
from dataclasses import replace

from fednats.protocol.events import Event, VersionAnnounced
from fednats.services.daemon.answers import Fit

KEPT = 64
"""Announcements to remember: a combination is done before this many newer versions are announced."""


class Fits:
    """The `Fit` of each recent version, for one region."""

    def __init__(self) -> None:
        self._newest: Fit | None = None
        self._first_version = 0
        """First version of the newest fit's run."""
        self._known = asyncio.Event()
        self._announced: dict[int, VersionAnnounced] = {}

    def note(self, event: Event) -> None:
        """Remember an announced version, live or in a replay."""
        if isinstance(event, VersionAnnounced):
            self._announced[event.version] = event
            while len(self._announced) > KEPT:
                del self._announced[next(iter(self._announced))]

    def take(self, fit: Fit, first_version: int) -> None:
        """Take the worker's fit for the newest version; its run began with ``first_version``."""
        self._newest, self._first_version = fit, first_version
        self._known.set()

    async def at(self, version: int) -> Fit | None:
        """Return the fit at ``version``; None if another run, or another packing of deltas, has begun since.

        After a restart this waits until a model is announced again.
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
