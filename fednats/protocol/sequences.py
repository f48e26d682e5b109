"""Replay protection: which update numbers of a site were taken in (anti-replay window of RFC 4303, section 3.4.3).

A site numbers its updates, the first by its clock (`fednats.storage.outbox.first_number`). They arrive in order, except
those that a killed daemon had taken: they are redelivered seconds later, perhaps after newer ones. So a number below
the newest is a replay only if it was taken in before, or if it is `WINDOW` or more below the newest.
"""

from fednats.errors import Reason, RefusedError

WINDOW = 1024
"""How far below a site's newest number an update may still arrive. A site makes fewer updates before any redelivery."""


class Sequences:
    """The numbers of one site's updates, and which update had which."""

    def __init__(self) -> None:
        self._taken: dict[int, str | None] = {}
        """Update id by number; None once the update is in a sum."""
        self._newest = 0

    def check(self, sequence: int, update_id: str) -> None:
        """Refuse a number that is too old, in a sum, or another update's. An update may recur until it is in a sum.

        Raises:
            RefusedError: ``replayed``.
        """
        if sequence <= self._newest - WINDOW:
            raise RefusedError(Reason.REPLAYED, f"number {sequence} is out of date, the newest is {self._newest}")
        if (taken := self._taken.get(sequence, update_id)) != update_id:
            became = "is in a sum" if taken is None else f"is that of update {taken}"
            raise RefusedError(Reason.REPLAYED, f"number {sequence} {became}")

    def take(self, sequence: int, update_id: str) -> None:
        """Record an update as taken in."""
        self._taken[sequence] = update_id
        if sequence > self._newest:
            self._newest = sequence
            if len(self._taken) > 2 * WINDOW:  # not for every number, as this walks over all of them
                self._taken = {number: by for number, by in self._taken.items() if number > sequence - WINDOW}

    def settle(self, sequence: int) -> None:
        """Record that the update with this number is in a sum."""
        if sequence in self._taken:
            self._taken[sequence] = None
