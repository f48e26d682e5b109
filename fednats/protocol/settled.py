"""Contributions that a node has finished with, by id, and the numbers of the sites' updates."""

from collections import OrderedDict
from typing import Generic, TypeVar

from fednats.errors import Reason
from fednats.messages import Aggregate, Composition, Update
from fednats.protocol.events import Refuse, Settle, contribution_id
from fednats.protocol.sequences import Sequences

REMEMBERED = 100_000
"""Number of finished ids kept to recognise late duplicates."""

T = TypeVar("T")


class Newest(Generic[T]):
    """Values by id, for the `REMEMBERED` ids added last. Every operation takes constant time."""

    def __init__(self) -> None:
        self._values: OrderedDict[str, T] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, identity: str) -> bool:
        return identity in self._values

    def __getitem__(self, identity: str) -> T:
        return self._values[identity]

    def add(self, identity: str, value: T) -> None:
        """Remember ``value``. An id that is already here keeps its place in the order."""
        self._values[identity] = value
        while len(self._values) > REMEMBERED:
            self._values.popitem(last=False)

    def clear(self) -> None:
        """Forget all."""
        self._values.clear()


class Settled:
    """Remembers the newest `REMEMBERED` ids, and a window of update numbers per site."""

    def __init__(self) -> None:
        self._ids: Newest[Refuse | None] = Newest()
        self._sequences: dict[str, Sequences] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def __contains__(self, identity: str) -> bool:
        return identity in self._ids

    def again(self, identity: str) -> Refuse | Settle:
        """Return the answer to a redelivered contribution that is finished: its refusal, or a settlement."""
        return self._ids[identity] or Settle((identity,))

    def remember(self, identity: str, refusal: Refuse | None = None) -> None:
        """Remember that ``identity`` was settled, or refused with ``refusal``."""
        self._ids.add(identity, refusal)

    def clear(self) -> None:
        """Forget the ids; the numbers stay."""
        self._ids.clear()

    def take_number(self, head: Update | Aggregate) -> None:
        """Record the number of an update, or refuse it. A sum has no number: its id follows from its content.

        Raises:
            RefusedError: ``replayed``.
        """
        if isinstance(head, Update):
            sequences = self._sequences.setdefault(head.site, Sequences())
            sequences.check(head.sequence, head.update_id)
            sequences.take(head.sequence, head.update_id)

    def settle_number(self, head: Update | Aggregate) -> None:
        """Record that the update with this number is in a sum."""
        if isinstance(head, Update) and head.site in self._sequences:
            self._sequences[head.site].settle(head.sequence)

    def note(self, composition: Composition) -> None:
        """Record a sum made since a backup as if this node remembered making it."""
        for part in composition.parts:
            identity = contribution_id(part.head)
            why = composition.quarantined.get(identity)
            self.remember(identity, None if why is None else Refuse(identity, Reason.OUTLIER, why))
            if isinstance(part.head, Update):
                self._sequences.setdefault(part.head.site, Sequences()).take(part.head.sequence, identity)
                self.settle_number(part.head)
