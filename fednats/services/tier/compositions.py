"""A node's notes to itself on the bus, for restoring from a backup: what its versions or sums were made of.

A note is stored before its version or sum is published, so everything published has one.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from fednats import subjects, wire
from fednats.errors import RefusedError
from fednats.messages import Composition, EvaluationBlocks, Message, OpeningNote
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.retry import ask, persist
from fednats.transport.bus import Bus
from fednats.wire import MessageT

BLOCKS = "evaluation_blocks"
"""Name of the note that says which sites share sums of evaluations. It is no valid id of a sum."""


def opening_name(version: int) -> str:
    """Return the name of the note of the opening whose first version is ``version``."""
    return f"opening-{version}"


class Compositions:
    """The notes of one node. ``may_write`` returns when this process may publish for the node."""

    def __init__(
        self, bus: Bus, run: str, node: str, identity: Identity, log: Any, may_write: Callable[[], Awaitable[None]]
    ) -> None:
        self._bus = bus
        self._run = run
        self._node = node
        self._stream = subjects.compositions_stream(run, node)
        self._identity = identity
        self._log = log
        self._may_write = may_write
        self._blocks: EvaluationBlocks | None = None

    async def write(self, name: str, composition: Composition) -> None:
        """Store what the version or sum ``name`` was made of. Storing it again changes nothing."""
        await self._write(name, composition)

    async def write_opening(self, note: OpeningNote) -> None:
        """Store the settings with which a run was opened or extended."""
        await self._write(opening_name(note.opening.opened_at), note)

    async def read_opening(self, version: int) -> OpeningNote | None:
        """Return the note of the opening at ``version``; None if there is none that this node signed."""
        return await self._read(opening_name(version), OpeningNote)

    async def write_blocks(self, blocks: EvaluationBlocks) -> None:
        """Store which sites share sums of evaluations from now on, unless this process has stored the same before."""
        if blocks != self._blocks:
            await self._write(BLOCKS, blocks)
            self._blocks = blocks

    async def read(self, name: str) -> Composition | None:
        """Return what ``name`` was made of; None if there is no note that this node signed."""
        return await self._read(name, Composition)

    async def read_blocks(self) -> EvaluationBlocks | None:
        """Return the newest note of `write_blocks`; None if there is none that this node signed."""
        return await self._read(BLOCKS, EvaluationBlocks)

    async def _write(self, name: str, message: Message) -> None:
        subject = subjects.composition(self._run, self._node, name)
        signed = self._identity.sign(subject, message)
        await self._may_write()
        await persist(self._log, lambda: self._bus.publish(subject, signed, wire.message_id(signed)))

    async def _read(self, name: str, expected: type[MessageT]) -> MessageT | None:
        subject = subjects.composition(self._run, self._node, name)
        record = await ask(self._log, lambda: self._bus.last(self._stream, subject))
        if record is None:
            return None
        try:
            return self._identity.open(subject, record.data, expected)
        except RefusedError as error:
            self._log.warning("note_unreadable", note=name, reason=error.reason.value, detail=error.detail)
            return None
