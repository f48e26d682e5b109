"""What a service tells whoever listens: small JSON on ``fed.<run>.event.<role>.<name>``, for people and monitoring.

Nothing depends on a notice. It is published once, to those who listen at that moment, and lost while the bus is away.
It has names, numbers and reasons, never anything that was learned from patients' data. bus/README.md lists them.
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
"""Of the JSON; it changes when a field is taken out or changes its meaning, not when one is added."""
MAX_WAITING = 256
"""Notices kept while they are being sent; more are dropped."""


class What(StrEnum):
    """What a notice is of; its fields are beside it."""

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
"""Notices of a service itself; those of an aggregator go to the node above as well, all others name its sites."""


class Notices:
    """Those of one service."""

    def __init__(self, role: str, name: str, run: str) -> None:
        self._who = {"role": role, "name": name, "run": run}
        self._subject = subjects.event(run, role, name)
        self._waiting: asyncio.Queue[tuple[What, bytes]] = asyncio.Queue(MAX_WAITING)

    def add(self, what: What, details: Mapping[str, object]) -> None:
        """Take a notice to be told; returns at once."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        notice = {"schema": SCHEMA, "at": at, **self._who, "what": what, "details": details}
        if not self._waiting.full():
            self._waiting.put_nowait((what, json.dumps(notice).encode()))

    async def tell(self, bus: Bus, above: Bus | None = None) -> None:
        """Publish what is added, for ever; what is `OF_ITSELF` on the bus ``above``, too."""
        while True:
            what, notice = await self._waiting.get()
            for listening in (bus, above if what in OF_ITSELF else None):
                try:
                    if listening is not None:
                        await listening.emit(self._subject, notice)
                except BusError:
                    pass  # nobody hears it
