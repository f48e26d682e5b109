"""Holds messages that arrive before their version is announced, up to a limit per sender."""

from typing import Generic, TypeVar

MAX_EARLY = 100
"""Most contributions, and most evaluations, held per sender; further ones are turned away."""

MAX_AHEAD = 1000
"""A version this far ahead of the announced one cannot exist yet: its contributions are refused."""

T = TypeVar("T")


class Early(Generic[T]):
    """Held items, by sender and id."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, T]] = {}

    def hold(self, sender: str, identity: str, item: T) -> bool:
        """Hold ``item``, once per id; return False if its sender has reached `MAX_EARLY`."""
        held = self._held.setdefault(sender, {})
        if identity not in held and len(held) >= MAX_EARLY:
            return False
        held[identity] = item
        return True

    def holds(self, sender: str, identity: str) -> bool:
        """Whether an item of ``sender`` is held under this id."""
        return identity in self._held.get(sender, {})

    def take(self) -> dict[str, T]:
        """Return all held items by id, and hold none of them any longer."""
        taken = {identity: item for held in self._held.values() for identity, item in held.items()}
        self._held.clear()
        return taken
