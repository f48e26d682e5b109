"""How a site reacts when its region refuses an update: one table, and the pauses.

Training costs time, and with differential privacy a part of the budget. A site therefore stops training where the next
update would be refused for the same reason, and tries again after a pause that doubles.
"""

from collections.abc import Container, Iterable, Mapping
from enum import Enum, auto
from types import MappingProxyType

from fednats.errors import Reason
from fednats.messages import Verdict


class Reaction(Enum):
    """A site's reaction to a refusal."""

    GO_ON = auto()
    """Train on: the next update differs. After `IN_A_ROW` refusals in a row the site pauses as well."""
    PAUSE = auto()
    """Stop training for a while: the next update would be refused too, until somebody changes something."""
    END = auto()
    """End the daemon: another process sends as this site. If that one was refused first, this one pauses instead."""


REACTIONS: Mapping[Reason, Reaction] = MappingProxyType(
    {
        Reason.REPLAYED: Reaction.END,
        Reason.SIGNATURE: Reaction.PAUSE,
        Reason.MALFORMED: Reaction.PAUSE,
        Reason.SCHEMA_VERSION: Reaction.PAUSE,
        Reason.OVERSIZED: Reaction.PAUSE,
        Reason.WRONG_RUN: Reaction.PAUSE,
        Reason.WRONG_SENDER: Reaction.PAUSE,
        Reason.WRONG_SHAPE: Reaction.PAUSE,
        Reason.TOO_FEW_SITES: Reaction.PAUSE,
        Reason.WRONG_GRID: Reaction.GO_ON,
        Reason.WRONG_KEY: Reaction.GO_ON,
        Reason.TOO_STALE: Reaction.GO_ON,
        Reason.TOO_NEW: Reaction.GO_ON,
        Reason.EARLIER_RUN: Reaction.GO_ON,
        Reason.CHECKSUM: Reaction.GO_ON,
        Reason.CIPHERTEXT: Reaction.GO_ON,
    }
)
"""Reaction by reason; any other reason means `Reaction.GO_ON`."""

IN_A_ROW = 3
FIRST_PAUSE_S = 60.0
LONGEST_PAUSE_S = 3600.0


class Pauses:
    """How long a site stops training, depending on the verdicts on its updates."""

    def __init__(self) -> None:
        self._in_a_row = 0
        self._pause_s = FIRST_PAUSE_S

    def accepted(self) -> None:
        """Reset: an update was accepted, so any problem is solved."""
        self._in_a_row = 0
        self._pause_s = FIRST_PAUSE_S

    def refused(self, reason: Reason | None) -> float:
        """Return how many seconds to pause after a refusal; 0 to go on.

        ``reason`` is None if this release does not know it.
        """
        if reason is Reason.EARLIER_RUN:  # says nothing about updates of this run
            return 0.0
        self._in_a_row += 1
        reaction = Reaction.GO_ON if reason is None else REACTIONS.get(reason, Reaction.GO_ON)
        if reaction is Reaction.GO_ON and self._in_a_row < IN_A_ROW:
            return 0.0
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, LONGEST_PAUSE_S)
        return pause_s


def sent_by_another(verdicts: Iterable[Verdict], own: Container[str], newest: int) -> str | None:
    """Return the evidence that another process sends as this site and this one must end; None without evidence.

    ``verdicts`` are the region's, newest last. ``own`` has the names of this process's updates, ``newest`` the number
    of the newest of them. If two processes use the same numbers, the first one to have an update refused as replayed
    ends; the other reads that refusal too, and goes on.
    """
    for verdict in verdicts:
        is_replay = verdict.reason == Reason.REPLAYED
        if verdict.name in own:
            if is_replay:
                return f"an update was refused as replayed, {verdict.detail}"
        elif is_replay:
            return None
        elif verdict.outcome == "accepted" and verdict.sequence > newest:
            return f"the region has accepted its number {verdict.sequence}, the newest here is {newest}"
    return None


def newest_known(verdicts: Iterable[Verdict], fresh: Iterable[Verdict], own: Container[str], newest: int) -> int:
    """Return the newest update number of a starting site that its region knows, according to ``verdicts``; 0 for none.

    ``own`` and ``newest`` are as in `sent_by_another`. If a ``fresh`` verdict refuses one of the site's own updates as
    replayed, the region knows other updates with the site's numbers.
    """
    known = max((verdict.sequence for verdict in verdicts), default=0)
    refused = any(verdict.name in own and verdict.reason == Reason.REPLAYED for verdict in fresh)
    return max(known, newest + 1) if refused else known
