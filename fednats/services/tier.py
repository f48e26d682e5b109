"""What the aggregator and the coordinator share: a `Collector` fed from the bus, its journal, its deliveries.

An event is journalled, then handled, then its commands are executed. A delivery is acknowledged only when the machine
settles it, so whatever a killed daemon had not finished is delivered again.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Protocol

from fednats import subjects, wire
from fednats.errors import BusError, Reason, RefusedError
from fednats.messages import Aggregate, Evaluation, EvaluationSum, Update
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    Command,
    ContributionArrived,
    DeadlineReached,
    EvaluationArrived,
    Event,
    Refuse,
    ReportWaiting,
    Settle,
    StartTimer,
    contribution_id,
    evaluation_id,
)
from fednats.services.lifecycle import Daemon
from fednats.storage.journal import Journal
from fednats.transport.bus import Bus, Delivery

READ_AHEAD = 2
"""Chunks of one contribution that are read ahead."""

REDELIVERY_S = 60.0
"""How long a restarted daemon waits for a contribution it had taken in to be delivered again."""

RETRY_S = 2.0


class Machine(Protocol):
    """A collector, or a machine around one."""

    def handle(self, event: Event) -> list[Command]:
        """Take in what happened, return what is to be done."""

    def outstanding(self) -> list[Command]:
        """Return what a restarted daemon has to do."""

    @property
    def n_buffered(self) -> int:
        """Contributions taken in and not yet combined."""


class Inbox:
    """One stream that contributions come from, and the connection it is read on."""

    def __init__(self, bus: Bus, stream: str) -> None:
        self.bus = bus
        self.stream = stream
        self._delivered: dict[str, tuple[Delivery, Update | Aggregate | None]] = {}

    def keep(self, identity: str, delivery: Delivery, head: Update | Aggregate | None) -> None:
        """Remember how to acknowledge ``identity``."""
        self._delivered[identity] = (delivery, head)

    async def settle(self, identity: str, *, refused: bool = False) -> None:
        """Drop the payload of ``identity`` and acknowledge its delivery; nothing if it was delivered elsewhere."""
        found = self._delivered.get(identity)
        if found is None:
            return
        delivery, head = found
        if head is not None:
            await self.bus.purge(self.stream, subjects.chunks(prefix_of(head), head.payload.payload_id))
        await (delivery.term() if refused else delivery.ack())
        if self._delivered.get(identity) is found:
            del self._delivered[identity]

    async def chunks(self, head: Update | Aggregate) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of a contribution, each checked against its digest."""
        payload = head.payload
        reading = self.bus.read_payload(
            self.stream, prefix_of(head), payload.payload_id, payload.digests, window=READ_AHEAD
        )
        async with aclosing(reading) as chunks:
            async for data in chunks:
                yield data


class Tier:
    """Feeds one machine and executes its commands in order; combining runs beside, one combination at a time."""

    def __init__(self, daemon: Daemon, journal: Journal, machine: Machine) -> None:
        self.daemon = daemon
        self.log = daemon.log
        self.accepted = 0
        self.refused = 0
        self.refusals: dict[str, int] = {}
        self._journal = journal
        self._machine = machine
        self._inboxes: dict[str, Inbox] = {}
        self._delivery = asyncio.Condition()
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._combinations: asyncio.Queue[Combination] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        self._due: asyncio.Queue[Event] = asyncio.Queue()
        self.combined: list[str] = []
        """Ids of all combinations that were made, the oldest first."""
        self._idle = asyncio.Event()
        self._idle.set()

    def restore(self) -> int:
        """Replay the journal into the machine and take up what was under way; return the number of events."""
        n_events = 0
        for event in self._journal.replay():
            self._machine.handle(event)
            self._note(event)
            n_events += 1
        for command in self._machine.outstanding():
            self._commands.put_nowait(command)
        return n_events

    def feed(self, event: Event) -> None:
        """Journal and handle ``event``; its commands are executed in turn."""
        self._journal.append(event)
        for command in self._machine.handle(event):
            self._commands.put_nowait(command)
        self._note(event)
        self.daemon.metrics.buffered.set(self._machine.n_buffered)

    def feed_later(self, delay_s: float, event: Event) -> asyncio.TimerHandle:
        """Feed ``event`` after a while."""
        return asyncio.get_running_loop().call_later(delay_s, self._due.put_nowait, event)

    async def keep_time(self) -> None:
        """Feed the events of timers that ran out, for ever."""
        while True:
            self.feed(await self._due.get())

    async def receive(self, inbox: Inbox, durable: str, filters: list[str]) -> None:
        """Take contributions and evaluations from ``inbox`` for ever."""
        async for delivery in inbox.bus.consume(inbox.stream, durable, filters):
            self.daemon.metrics.received_bytes.inc(len(delivery.data))
            try:
                event = _event(delivery, inbox, self.daemon.run)
            except RefusedError as error:
                identity = f"unreadable.{inbox.stream}.{delivery.stream_sequence}"
                inbox.keep(identity, delivery, None)
                self._inboxes[identity] = inbox
                self._commands.put_nowait(Refuse(identity, error.reason, f"{delivery.subject}: {error.detail}"))
                continue
            identity = _identity(event)
            async with self._delivery:
                self._inboxes[identity] = inbox
                self._delivery.notify_all()
            self.feed(event)

    async def execute(self, other: Callable[[Command], Awaitable[None]]) -> None:
        """Execute commands in order for ever; what is not common to all tiers goes to ``other``."""
        while True:
            command = await self._commands.get()
            match command:
                case Settle(ids):
                    for identity in ids:
                        await self._settle(identity)
                case Refuse(identity, reason, detail):
                    self.count_refused(reason, detail, contribution=identity)
                    await self._settle(identity, refused=True)
                case StartTimer(delay_s):
                    self._start_timer(delay_s)
                case ReportWaiting(n_contributions, n_present, min_sites):
                    self.daemon.metrics.waiting.inc()
                    self.log.warning(
                        "waiting_for_sites", n_contributions=n_contributions, n_present=n_present, min_sites=min_sites
                    )
                case Combine(combination):
                    self._idle.clear()
                    self._combinations.put_nowait(combination)
                case _:
                    await other(command)

    async def combine(self, make: Callable[[Combination], Awaitable[list[Event]]]) -> None:
        """Make combinations for ever: ``make`` returns the events that say what came of it."""
        while True:
            combination = await self._combinations.get()
            events = await make(combination)
            self._idle.set()
            for event in events:
                self.feed(event)

    def count_combined(self, combination: Combination) -> None:
        """Count what a finished combination took in."""
        self.accepted += len(combination.parts)
        self.daemon.metrics.accepted.inc(len(combination.parts))
        for part in combination.parts:
            self.daemon.metrics.staleness.observe(part.staleness)

    def count_refused(self, reason: Reason, detail: str, **fields: object) -> None:
        """Count and log what is refused."""
        self.refused += 1
        self.refusals[reason.value] = self.refusals.get(reason.value, 0) + 1
        self.daemon.metrics.refused.labels(reason=reason.value).inc()
        self.log.warning("refused", reason=reason.value, detail=detail, **fields)

    async def drain(self) -> None:
        """Wait until no combination is under way."""
        await self._idle.wait()

    async def chunks(self, head: Update | Aggregate) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of a contribution, checked; after a restart, wait until it is delivered again.

        Raises:
            RefusedError: a chunk is missing or damaged.
        """
        identity = contribution_id(head)
        async with self._delivery:
            try:
                async with asyncio.timeout(REDELIVERY_S):
                    await self._delivery.wait_for(lambda: identity in self._inboxes)
            except TimeoutError:
                raise RefusedError(Reason.CHECKSUM, "it was not delivered again after a restart") from None
        async with aclosing(self._inboxes[identity].chunks(head)) as chunks:
            async for data in chunks:
                yield data

    async def _settle(self, identity: str, *, refused: bool = False) -> None:
        inbox = self._inboxes.get(identity)
        while inbox is not None:
            try:
                await inbox.settle(identity, refused=refused)
            except BusError as error:
                self.log.warning("not_settled", contribution=identity, error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
            else:
                self._inboxes.pop(identity, None)
                return

    def _note(self, event: Event) -> None:
        if isinstance(event, Combined):
            self.combined.append(event.combination_id)

    def _start_timer(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.feed_later(delay_s, DeadlineReached())


def prefix_of(head: Update | Aggregate) -> str:
    """Return the subject prefix under which ``head`` and its payload were published."""
    if isinstance(head, Update):
        return subjects.update(head.run, head.region, head.site)
    return subjects.aggregate(head.run, head.region)


def _event(delivery: Delivery, inbox: Inbox, run: str) -> ContributionArrived | EvaluationArrived:
    """Parse a delivery, hold its sender to the subject it may publish on, and keep how to acknowledge it."""
    tokens = delivery.subject.split(".")
    kind = tokens[2]
    event: ContributionArrived | EvaluationArrived
    if kind == "evaluation":
        event = EvaluationArrived(evaluation=wire.unpack(delivery.data, Evaluation))
    elif tokens[-1] == "evaluation":
        event = EvaluationArrived(evaluation=wire.unpack(delivery.data, EvaluationSum))
    elif kind == "update":
        event = ContributionArrived(head=wire.unpack(delivery.data, Update))
    else:
        event = ContributionArrived(head=wire.unpack(delivery.data, Aggregate))
    message = event.head if isinstance(event, ContributionArrived) else event.evaluation
    if message.run != run:
        raise RefusedError(Reason.WRONG_RUN, f"run {message.run!r}, this is {run!r}")
    if delivery.subject != _subject(event):
        raise RefusedError(Reason.WRONG_SENDER, f"came on {delivery.subject}, says it is from {_subject(event)}")
    inbox.keep(_identity(event), delivery, event.head if isinstance(event, ContributionArrived) else None)
    return event


def _subject(event: ContributionArrived | EvaluationArrived) -> str:
    if isinstance(event, ContributionArrived):
        return subjects.head(prefix_of(event.head))
    evaluation = event.evaluation
    if isinstance(evaluation, Evaluation):
        return subjects.evaluation(evaluation.run, evaluation.region, evaluation.site)
    return subjects.evaluation_sum(evaluation.run, evaluation.region)


def _identity(event: ContributionArrived | EvaluationArrived) -> str:
    return contribution_id(event.head) if isinstance(event, ContributionArrived) else evaluation_id(event.evaluation)
