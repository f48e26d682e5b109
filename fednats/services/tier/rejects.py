"""Keep what a node refuses in a stream where its operator finds it."""

from typing import Any

from fednats import subjects, wire
from fednats.errors import BusError, Reason
from fednats.messages import Reject
from fednats.transport.bus import Bus

MAX_DATA_BYTES = 64 * 2**10
"""Bytes kept of a refused message: a whole head, or the beginning of anything larger."""

MAX_DETAIL = 1000


class Rejects:
    """The bounded stream of one node's refused messages."""

    def __init__(self, bus: Bus, run: str, node: str, log: Any) -> None:
        self._bus = bus
        self._run = run
        self._node = node
        self._log = log

    async def add(self, source: str, subject: str, data: bytes, reason: Reason, detail: str) -> None:
        """Keep ``data``, which came on ``subject``. Adding the same ``source`` again changes nothing.

        ``source`` says where the message is stored: stream and sequence number. Rejects are for people to look at, so a
        failure to keep one is only logged.
        """
        sender = subjects.sender(subject)
        reject = Reject(
            run=self._run,
            node=self._node,
            subject=subject,
            sender=sender,
            reason=reason.value,
            detail=detail[:MAX_DETAIL],
            n_bytes=len(data),
            data=data[:MAX_DATA_BYTES],
        )
        try:
            await self._bus.publish(
                subjects.reject(self._run, self._node, sender, reason.value), wire.pack(reject), source
            )
        except BusError as error:
            self._log.warning("reject_not_kept", subject=subject, error=str(error))
