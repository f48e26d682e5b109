"""Publish notices for people and monitoring: small JSON on ``fed.<run>.event.<role>.<name>``.

Nothing depends on a notice. It is published once, to current listeners, and lost while the bus is away. It holds names,
numbers and reasons, never anything learned from patients' data. bus/README.md lists the notices.
"""

import asyncio
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum

from fednats import subjects
from fednats.errors import BusError
from fednats.transport.bus import Bus

SCHEMA = 1
"""Version of the JSON. It changes when a field is removed or changes its meaning, not when one is added."""
MAX_WAITING = 256
"""Most notices that may wait to be sent; more are dropped."""


class What(StrEnum):
    """The kind of a notice; the comment beside each lists its fields."""

    RUN_OPENED = "run_opened"  # opened, version
    RUN_CLOSED = "run_closed"  # opened, version, reason
    VERSION_MADE = "version_made"  # version
    ACCEPTED = "accepted"  # sources, version
    REFUSED = "refused"  # contribution, reason
    QUARANTINED = "quarantined"  # source, contribution
    CLAIM_BOUNDED = "claim_bounded"  # source, claimed, believed
    DELTA_NORM_JUMPED = "delta_norm_jumped"  # version
    SOURCE_JOINED = "source_joined"  # source
    SOURCE_LEFT = "source_left"  # source
    BUDGET_SPENT = "budget_spent"  # version
    HINDERED = "hindered"  # obstacle, why
    UNHINDERED = "unhindered"  # obstacle
    CERTIFICATE_ENDING = "certificate_ending"  # server, days


OF_ITSELF = frozenset({What.HINDERED, What.UNHINDERED, What.CERTIFICATE_ENDING})
"""Notices about the service itself. An aggregator sends only these to the node above too: others may name its sites."""


class Notices:
    """The notices of one service."""

    def __init__(self, role: str, name: str, run: str) -> None:
        self._who = {"role": role, "name": name, "run": run}
        self._subject = subjects.event(run, role, name)
        self._waiting: asyncio.Queue[tuple[What, bytes]] = asyncio.Queue(MAX_WAITING)

    def add(self, what: What, details: Mapping[str, object]) -> None:
        """Queue a notice; return at once. Drop it if `MAX_WAITING` wait already."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        notice = {"schema": SCHEMA, "at": at, **self._who, "what": what, "details": details}
        if not self._waiting.full():
            self._waiting.put_nowait((what, json.dumps(notice).encode()))

    async def tell(self, bus: Bus, above: Bus | None = None) -> None:
        """Publish queued notices on ``bus``, forever; those in `OF_ITSELF` on ``above`` too."""
        while True:
            what, notice = await self._waiting.get()
            for listening in (bus, above if what in OF_ITSELF else None):
                try:
                    if listening is not None:
                        await listening.emit(self._subject, notice)
                except BusError:
                    pass  # the notice is lost
