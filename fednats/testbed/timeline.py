"""What each site had done by when, as whoever watches all daemons of a federation sees it.

Regions know who contributes, the coordinator does not: this is for a run whose daemons are all on one machine.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

MAX_POINTS = 200
"""Of one site; of more, every other one is dropped."""


class Seen(BaseModel):
    """A site at one moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at_s: float
    """Since the start of the first process."""
    updates: int
    """Sent so far."""
    staleness: int | None
    """Versions between the newest one and that which it last trained on; None before the first."""
    sent_bytes: int
    received_bytes: int


class Timeline:
    """Collects `Seen` by site."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Seen]] = {}

    def note(self, statuses: Mapping[str, Mapping[str, Any]], at_s: float) -> None:
        """Take in what all daemons say now."""
        newest = statuses.get("coordinator", {}).get("version", -1)
        for status in statuses.values():
            if status.get("role") == "site" and "state" in status:
                self._add(status["name"], _seen(status, newest, at_s))

    def shown(self) -> dict[str, list[Seen]]:
        """Return what was seen of each site, in the order of time."""
        return {name: list(seen) for name, seen in sorted(self._seen.items())}

    def _add(self, name: str, seen: Seen) -> None:
        known = self._seen.setdefault(name, [])
        known.append(seen)
        if len(known) > MAX_POINTS:
            del known[1:-1:2]


def _seen(status: Mapping[str, Any], newest: int, at_s: float) -> Seen:
    trained = status["version"]
    return Seen(
        at_s=round(at_s, 2),
        updates=status["updates"],
        staleness=newest - trained if 0 <= trained <= newest else None,
        sent_bytes=status["sent_bytes"],
        received_bytes=status["received_bytes"],
    )
