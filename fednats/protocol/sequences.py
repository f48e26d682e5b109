"""Replays: which numbers of a site's updates have been taken in, after the anti-replay window of RFC 4303, section 3.4.3.

A site numbers its updates, the first by its clock (`fednats.storage.outbox.first_number`). They come in order but for
those that a daemon was killed with: these are delivered again seconds later, and others may have come first. So a number
below the newest is no replay unless it was taken in already, and everything more than `WINDOW` below the newest is one.
"""

from fednats.errors import Reason, RefusedError

WINDOW = 1024
"""Numbers below a site's newest that may still come: more than it makes in the time of any redelivery."""


class Sequences:
    """The numbers that one site's updates have had, and which update had which."""

    def __init__(self) -> None:
        self._taken: dict[int, str | None] = {}
        """By number; None once it is in a sum."""
        self._newest = 0

    def check(self, sequence: int, update_id: str) -> None:
        """Refuse a number that is too old, in a sum, or another update's; an update may come again until it is in a sum.

        Raises:
            RefusedError: ``replayed``.
        """
        if sequence <= self._newest - WINDOW:
            raise RefusedError(Reason.REPLAYED, f"number {sequence} is out of date, the newest is {self._newest}")
        if (taken := self._taken.get(sequence, update_id)) != update_id:
            became = "is in a sum" if taken is None else f"is that of update {taken}"
            raise RefusedError(Reason.REPLAYED, f"number {sequence} {became}")

    def take(self, sequence: int, update_id: str) -> None:
        """Count an update as taken in."""
        self._taken[sequence] = update_id
        if sequence > self._newest:
            self._newest = sequence
            if len(self._taken) > 2 * WINDOW:  # not at each number: that would be a walk over all of them
                self._taken = {number: by for number, by in self._taken.items() if number > sequence - WINDOW}

    def settle(self, sequence: int) -> None:
        """Count the update of this number as in a sum."""
        if sequence in self._taken:
            self._taken[sequence] = None
