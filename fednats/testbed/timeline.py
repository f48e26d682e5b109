"""The progress of each site over time, for a run whose daemons are all on one machine.

In the field nobody sees this: regions know who contributes, but the coordinator does not.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

MAX_POINTS = 200
"""Most points of one site; when there are more, every other one is dropped."""


class Seen(BaseModel):
    """The state of a site at one moment."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at_s: float
    """Time since the start of the first process."""
    updates: int
    """Updates sent so far."""
    staleness: int | None
    """How many versions the newest is ahead of the one it last trained on; None before the first."""
    sent_bytes: int
    received_bytes: int


class Timeline:
    """Collects the states of all sites."""

    def __init__(self) -> None:
        self._seen: dict[str, list[Seen]] = {}

    def note(self, statuses: Mapping[str, Mapping[str, Any]], at_s: float) -> None:
        """Record the present ``statuses`` of all daemons."""
        newest = statuses.get("coordinator", {}).get("version", -1)
        for status in statuses.values():
            if status.get("role") == "site" and "state" in status:
                self._add(status["name"], _seen(status, newest, at_s))

    def shown(self) -> dict[str, list[Seen]]:
        """Return the states of each site, in order of time."""
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
