"""Receive contributions and evaluations: verify, parse, check the sender's subject, read chunks, acknowledge."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from fednats import subjects
from fednats.errors import FednatsError, Reason, RefusedError
from fednats.messages import Aggregate, Evaluation, EvaluationSum, Update
from fednats.protocol.events import ContributionArrived, EvaluationArrived, contribution_id, evaluation_id
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.retry import ask
from fednats.services.tier.rejects import Rejects
from fednats.transport.bus import Bus, Delivery

READ_AHEAD = 2
"""Chunks of one contribution to read ahead."""

Arrived = ContributionArrived | EvaluationArrived

Head = Update | Aggregate | Evaluation | EvaluationSum
"""A message that names the chunks of a payload."""


class VanishedError(FednatsError):
    """The stream has lost a contribution that was taken in. Its sender may send it again."""

    def __init__(self, contribution_id: str, detail: str) -> None:
        super().__init__(f"{contribution_id}: {detail}")
        self.contribution_id = contribution_id


class Inbox:
    """The streams of contributions, one for each sender, and the connection to read them on."""

    def __init__(self, bus: Bus, stream_of: Callable[[str], str], run: str, identity: Identity, log: Any) -> None:
        self.bus = bus
        self.stream_of = stream_of
        """Returns the name of a sender's stream."""
        self._run = run
        self._identity = identity
        self._log = log
        self._delivered: dict[str, dict[tuple[str, int], tuple[Delivery, Head | None]]] = {}

    def open(self, delivery: Delivery) -> Arrived:
        """Verify and parse a delivery, check that its sender may publish on its subject, and remember how to settle it.

        Raises:
            RefusedError: it does not fit its subject; refuse it under `unreadable_id`.
        """
        try:
            event = _parse(delivery, self._run, self._identity)
        except RefusedError:
            self._keep(self.unreadable_id(delivery), delivery, None)
            raise
        head = event.head if isinstance(event, ContributionArrived) else event.evaluation
        self._keep(identity_of(head), delivery, head)
        return event

    def unreadable_id(self, delivery: Delivery) -> str:
        """Return the id for a delivery that cannot be read: its stream and sequence number."""
        return f"{delivery.stream}.{delivery.stream_sequence}"

    def n_unsettled(self, sender: str) -> int:
        """Count the messages of ``sender`` that were delivered here and are not settled."""
        stream = self.stream_of(sender)
        return sum(where == stream for deliveries in self._delivered.values() for where, _ in deliveries)

    async def settle(self, identity: str) -> None:
        """Drop the payload of ``identity`` and acknowledge its deliveries. Do nothing if it was not delivered here."""
        for delivery, head in self._deliveries(identity):
            await self._drop(head)
            await delivery.ack()
            self._forget(identity, delivery)

    async def refuse(self, identity: str, rejects: Rejects, reason: Reason, detail: str) -> None:
        """Add the deliveries of ``identity`` to ``rejects``, drop its payload and terminate the deliveries."""
        for delivery, head in self._deliveries(identity):
            await rejects.add(self.unreadable_id(delivery), delivery.subject, delivery.data, reason, detail)
            await self._drop(head)
            await delivery.term()
            self._forget(identity, delivery)

    async def chunks(self, head: Head) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of a contribution, each checked against its digest. Waits while the bus is away.

        Chunks are read by subject, whether or not the contribution was delivered to this process.

        Raises:
            RefusedError: a chunk is damaged, or was never sent.
            VanishedError: the stream was lost after the contribution was taken in.
        """
        payload = head.payload
        reading = self.bus.read_payload(
            self.stream_of(sender_of(head)), prefix_of(head), payload.payload_id, payload.digests, window=READ_AHEAD
        )
        try:
            async with aclosing(reading) as chunks:
                async for data in chunks:
                    yield data
        except RefusedError as error:
            if await self._vanished(head):
                self._log.warning("contribution_vanished", contribution=identity_of(head), detail=error.detail)
                raise VanishedError(identity_of(head), error.detail) from error
            raise

    async def _vanished(self, head: Head) -> bool:
        """Whether the stream was made anew since the contribution arrived, or has not delivered it to this process."""
        stream = self.stream_of(sender_of(head))
        delivered = self._delivered.get(identity_of(head), {})
        arrived = max((number for where, number in delivered if where == stream), default=None)
        return arrived is None or arrived < await ask(self._log, lambda: self.bus.first_sequence(stream))

    async def _drop(self, head: Head | None) -> None:
        if head is not None:
            stream, prefix = self.stream_of(sender_of(head)), prefix_of(head)
            await self.bus.purge(stream, subjects.chunks(prefix, head.payload.payload_id))

    def _deliveries(self, identity: str) -> list[tuple[Delivery, Head | None]]:
        return list(self._delivered.get(identity, {}).values())

    def _keep(self, identity: str, delivery: Delivery, head: Head | None) -> None:
        self._delivered.setdefault(identity, {})[delivery.stream, delivery.stream_sequence] = (delivery, head)

    def _forget(self, identity: str, delivery: Delivery) -> None:
        left, where = self._delivered[identity], (delivery.stream, delivery.stream_sequence)
        if left[where][0] is delivery:
            del left[where]
        if not left:
            del self._delivered[identity]


def sender_of(head: Head) -> str:
    """Return the site or region that sent ``head``."""
    return head.site if isinstance(head, Update | Evaluation) else head.region


def prefix_of(head: Head) -> str:
    """Return the subject prefix under which the payload of ``head`` was published."""
    if isinstance(head, Update | Evaluation):
        return subjects.update(head.run, head.region, head.site)
    return subjects.aggregate(head.run, head.region)


def _parse(delivery: Delivery, run: str, identity: Identity) -> Arrived:
    subject, data = delivery.subject, delivery.data
    tokens = subject.split(".")
    event: Arrived
    if tokens[2] == "evaluation":
        event = EvaluationArrived(evaluation=identity.open(subject, data, Evaluation))
    elif tokens[-1] == "evaluation":
        event = EvaluationArrived(evaluation=identity.open(subject, data, EvaluationSum))
    elif tokens[2] == "update":
        event = ContributionArrived(head=identity.open(subject, data, Update))
    else:
        event = ContributionArrived(head=identity.open(subject, data, Aggregate))
    message = event.head if isinstance(event, ContributionArrived) else event.evaluation
    if message.run != run:
        raise RefusedError(Reason.WRONG_RUN, f"run {message.run!r}, this is {run!r}")
    if subject != _subject(event):
        raise RefusedError(Reason.WRONG_SENDER, f"came on {subject}, says it is from {_subject(event)}")
    if isinstance(event, ContributionArrived) and event.head.payload.payload_id != contribution_id(event.head):
        # otherwise many heads could name one payload, which would be added once for each
        detail = (
            f"{contribution_id(event.head)} names the payload {event.head.payload.payload_id}, which is not its own"
        )
        raise RefusedError(Reason.MALFORMED, detail)
    return event


def _subject(event: Arrived) -> str:
    if isinstance(event, ContributionArrived):
        return subjects.head(prefix_of(event.head))
    evaluation = event.evaluation
    if isinstance(evaluation, Evaluation):
        return subjects.evaluation(evaluation.run, evaluation.region, evaluation.site)
    return subjects.evaluation_sum(evaluation.run, evaluation.region)


def identity_of(head: Head) -> str:
    """Return the id under which ``head`` is delivered and settled."""
    return evaluation_id(head) if isinstance(head, Evaluation | EvaluationSum) else contribution_id(head)
