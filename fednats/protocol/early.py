"""What came before the version that it is of was announced here: held until it is, so much of each sender."""

from typing import Generic, TypeVar

MAX_EARLY = 100
"""Contributions, and evaluations, of one sender that are held; more are refused."""

MAX_AHEAD = 1000
"""A version this far ahead of the announced one cannot exist yet: its contributions are refused."""

T = TypeVar("T")


class Early(Generic[T]):
    """Items by sender and id."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, T]] = {}

    def hold(self, sender: str, identity: str, item: T) -> bool:
        """Hold ``item``, once; False if that would be too much of its sender."""
        held = self._held.setdefault(sender, {})
        if identity not in held and len(held) >= MAX_EARLY:
            return False
        held[identity] = item
        return True

    def holds(self, sender: str, identity: str) -> bool:
        """Whether an item of ``sender`` is held under this id."""
        return identity in self._held.get(sender, {})

    def take(self) -> dict[str, T]:
        """Return all that is held by id, and hold nothing."""
        taken = {identity: item for held in self._held.values() for identity, item in held.items()}
        self._held.clear()
        return taken
