"""Publish a region's sums for the node above: signed, under the region's lease."""

from collections.abc import AsyncIterable, Callable, Iterable
from typing import Any

from fednats import subjects, wire
from fednats.errors import RefusedError
from fednats.messages import Aggregate, EvaluationSum
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.retry import ask
from fednats.services.tier.lease import HeldLease
from fednats.transport.bus import Bus
from fednats.wire import MessageT


class Published:
    """The region's stream of sums, as its own aggregator writes and reads it."""

    def __init__(
        self, daemon: Daemon, uplink: Bus, identity: Identity, lease: HeldLease, run: str, region: str
    ) -> None:
        self._metrics = daemon.metrics
        self._log: Any = daemon.log
        self._uplink = uplink
        self._identity = identity
        self._lease = lease
        self.run, self.region = run, region
        self._stream = subjects.aggregates_stream(run, region)
        self._prefix = subjects.aggregate(run, region)
        self.sums, self.evaluations = subjects.head(self._prefix), subjects.evaluation_sum(run, region)
        """Subjects for the heads of sums, and of sums of evaluations."""
        self.n_bytes = 0
        """Bytes published since this process started."""

    async def newest(self, subject: str, kind: type[MessageT]) -> MessageT | None:
        """Return what this region published last on ``subject``; None if nothing, or if it cannot be opened."""
        record = await ask(self._log, lambda: self._uplink.last(self._stream, subject))
        try:
            return None if record is None else self._identity.open(subject, record.data, kind)
        except RefusedError:
            return None

    async def publish(
        self,
        subject: str,
        head: Aggregate | EvaluationSum,
        chunks: Callable[[], Iterable[bytes] | AsyncIterable[bytes]],
    ) -> int:
        """Publish the payload of ``head``, then ``head`` on ``subject``; return the number of bytes.

        ``chunks`` is called once for each attempt. Raises as `HeldLease.publish`.
        """
        signed, identity = self._identity.sign(subject, head), head.payload.payload_id
        await self._lease.publish(
            lambda fence: self._uplink.publish_payload(self._prefix, identity, chunks(), fence=fence)
        )
        await self._lease.publish(
            lambda fence: self._uplink.publish(subject, signed, wire.message_id(signed), fence=fence)
        )
        n_bytes = head.payload.n_bytes + len(signed)
        self.n_bytes += n_bytes
        self._metrics.sent_bytes.inc(n_bytes)
        return n_bytes

    async def drop(self, payload_id: str) -> None:
        """Drop the chunks of a payload."""
        chunks = subjects.chunks(self._prefix, payload_id)
        await ask(self._log, lambda: self._uplink.purge(self._stream, chunks))
