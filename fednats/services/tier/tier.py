"""What the aggregator and the coordinator share: a machine fed from the bus, its journal and its commands.

An event is durable before it is handled, and handled before its commands are executed. A delivery is acknowledged only
when the machine settles it, so the bus redelivers whatever a killed daemon had not finished.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from typing import Protocol

from fednats.errors import BusError, DatabaseLockedError, RefusedError
from fednats.protocol import admission
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    Command,
    DeadlineReached,
    Event,
    Refuse,
    ReportBounded,
    ReportNotEvaluated,
    ReportWaiting,
    Settle,
    StartTimer,
    contribution_id,
)
from fednats.protocol.settled import Newest
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.notices import What
from fednats.services.daemon.retry import RETRY_S
from fednats.services.tier.inbox import Head, Inbox
from fednats.services.tier.rejects import Rejects
from fednats.storage.journal import Journal
from fednats.transport.bus import Delivery

MAX_BATCH = 256
"""Most events that are journalled in one transaction and handled in one go."""


class TierMachine(Protocol):
    """A collector, or a machine around one."""

    def handle(self, event: Event) -> list[Command]:
        """Take in an event; return the commands to execute."""

    def known(self, event: Event) -> list[Command] | None:
        """Return the commands that answer a known event; None if the event is new and must be handled."""

    def outstanding(self) -> list[Command]:
        """Return the commands that a restarted daemon must execute."""

    @property
    def in_flight(self) -> Combination | None:
        """The combination under way."""

    @property
    def n_buffered(self) -> int:
        """Contributions taken in and not yet combined."""

    @property
    def bounded(self) -> Mapping[str, ReportBounded]:
        """Sources whose last claim of mass was believed only in part."""


@dataclass(frozen=True, slots=True)
class Handled:
    """One event and its outcome, live or in a replay."""

    event: Event
    at_s: float
    """Seconds since the epoch."""
    elapsed_s: float
    """Seconds since the first event."""
    commands: list[Command]
    combination: Combination | None
    """The combination that the event completes, without quarantined parts; None for other events."""


class Tier:
    """Feeds one machine and executes its commands in order. Combinations run beside that, one at a time.

    ``note`` is called for every handled event, including those replayed from the journal.
    """

    def __init__(
        self, daemon: Daemon, journal: Journal, machine: TierMachine, rejects: Rejects, note: Callable[[Handled], None]
    ) -> None:
        self.daemon = daemon
        self.log = daemon.log
        self.rejects = rejects
        self.inboxes: Mapping[type[Head], Inbox] = {}
        """Inbox for each kind of contribution and evaluation."""
        self.note_unreadable: Callable[[Delivery, Refuse], None] = lambda _delivery, _refuse: None
        """Called for each delivery that is refused because it cannot be read."""
        self.may_settle: Callable[[], Awaitable[None]] = _at_once
        """Returns when this process may settle or refuse deliveries; raises if it no longer may."""
        self.accepted = 0
        self.refused = 0
        self.refusals: dict[str, int] = {}
        self._journal = journal
        self._machine = machine
        self._note = note
        self._refused_ids: Newest[None] = Newest()
        self._first_at_s: float | None = None
        self._started = (time.time(), time.monotonic())
        self._fed: asyncio.Queue[tuple[Event, asyncio.Future[None]]] = asyncio.Queue()
        self._commands: asyncio.Queue[Command] = asyncio.Queue()
        self._combinations: asyncio.Queue[Combination] = asyncio.Queue()
        self._timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    # --- events -------------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def journalling(self) -> AsyncIterator[None]:
        """Take in events until the context is left. Raises LocalStorageError if the journal cannot be written."""
        try:
            async with asyncio.TaskGroup() as group:
                keeping = group.create_task(self._keep_journal(), name="keep journal")
                try:
                    yield
                finally:
                    keeping.cancel()
        finally:
            self._journal.close()

    async def replay(self) -> int:
        """Replay the journal into the machine; return the number of events. Call `take_up` next.

        Meanwhile ``/status`` keeps its last content and says ``replaying``, because a thread is changing the machine.
        """
        before = {**self.daemon.status(), "state": "replaying"}
        status, self.daemon.status = self.daemon.status, lambda: before
        try:
            return await asyncio.to_thread(self._replay)
        finally:
            self.daemon.status = status

    def take_up(self) -> None:
        """Resume what was under way when the journal ended."""
        for command in self._machine.outstanding():
            self._commands.put_nowait(command)

    async def feed(self, *events: Event) -> None:
        """Feed ``events`` in order; return when they are durable and handled. Their commands are queued."""
        handled = [self._put(event) for event in events]
        await handled[-1]

    def feed_later(self, delay_s: float, event: Event) -> asyncio.TimerHandle:
        """Feed ``event`` after ``delay_s`` seconds."""
        return asyncio.get_running_loop().call_later(delay_s, self._put, event)

    def take(self, inbox: Inbox, delivery: Delivery) -> None:
        """Take in a contribution or an evaluation. A known one is answered, but not journalled again."""
        self.daemon.metrics.received_bytes.inc(len(delivery.data))
        try:
            event = inbox.open(delivery)
        except RefusedError as error:
            refuse = Refuse(inbox.unreadable_id(delivery), error.reason, f"{delivery.subject}: {error.detail}")
            self._count_refused(refuse)
            self.note_unreadable(delivery, refuse)
            self._commands.put_nowait(refuse)
            return
        commands = self._machine.known(event)
        if commands is None:
            self._put(event)  # not awaited, so that deliveries are journalled in batches
            return
        self._note(Handled(event, self._now_s(), self.elapsed_s, commands, None))
        for command in commands:
            self._commands.put_nowait(command)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the first event of the run; 0 before it."""
        return 0.0 if self._first_at_s is None else self._now_s() - self._first_at_s

    # --- commands -----------------------------------------------------------------------------------------------------

    async def execute(self, other: Callable[[Command], Awaitable[None]]) -> None:
        """Execute commands in order, forever. Commands that not all tiers have go to ``other``."""
        while True:
            command = await self._commands.get()
            match command:
                case Settle(ids):
                    await self.may_settle()
                    for inbox in set(self.inboxes.values()):
                        for identity in ids:
                            await self._until_done(inbox.settle, identity)
                case Refuse(identity, reason, detail):
                    self.log.warning("refused", contribution=identity, reason=reason.value, detail=detail)
                    self.daemon.notices.add(What.REFUSED, {"contribution": identity, "reason": reason.value})
                    await self.may_settle()
                    for inbox in set(self.inboxes.values()):
                        await self._until_done(inbox.refuse, identity, self.rejects, reason, detail)
                case StartTimer(delay_s):
                    self._start_timer(delay_s)
                case ReportWaiting() | ReportNotEvaluated() | ReportBounded():
                    self._say(command)
                case Combine(combination):
                    self._idle.clear()
                    self._combinations.put_nowait(combination)
                case _:
                    await other(command)

    async def combine(self, make: Callable[[Combination], Awaitable[list[Event]]]) -> None:
        """Make combinations, forever. ``make`` returns the events that tell the outcome.

        It returns none if the daemon stops first; the combination is then resumed after the restart.
        """
        while True:
            combination = await self._combinations.get()
            if events := await make(combination):
                await self.feed(*events)
                self._tell_accepted(combination, events)
            self._idle.set()

    async def drain(self) -> None:
        """Wait until no combination is under way."""
        await self._idle.wait()

    def chunks(self, head: Head) -> AsyncGenerator[bytes, None]:
        """Yield the checked chunks of a contribution or evaluation; see `Inbox.chunks`."""
        return self.inboxes[type(head)].chunks(head)

    async def refuse(self, source: str, subject: str, data: bytes, error: RefusedError) -> None:
        """Count, log and keep a refused message that did not come through an inbox."""
        self._count_refused(Refuse(source, error.reason, error.detail))
        self.log.warning("refused", subject=subject, reason=error.reason.value, detail=error.detail)
        await self.rejects.add(source, subject, data, error.reason, error.detail)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _put(self, event: Event) -> asyncio.Future[None]:
        handled = asyncio.get_running_loop().create_future()
        self._fed.put_nowait((event, handled))
        return handled

    async def _keep_journal(self) -> None:
        while True:
            batch = [await self._fed.get()]
            while len(batch) < MAX_BATCH and not self._fed.empty():
                batch.append(self._fed.get_nowait())
            at_s = self._now_s()
            await self._append([event for event, _ in batch], at_s)
            for event, handled in batch:
                for command in self._handle(event, at_s):
                    self._commands.put_nowait(command)
                if not handled.done():  # the feeding task may have been cancelled
                    handled.set_result(None)
            self._show_machine()

    async def _append(self, events: list[Event], at_s: float) -> None:
        """Write ``events``. Wait, and let nothing else proceed, while another process has locked the journal."""
        while True:
            try:
                await asyncio.to_thread(self._journal.append, events, at_s)
            except DatabaseLockedError as error:
                self.log.warning("journal_locked", error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
            else:
                return

    def _replay(self) -> int:
        n_events = 0
        for entry in self._journal.replay():
            n_events = entry.sequence
            self._handle(entry.event, entry.at_s)
            wall_s, monotonic_s = self._started
            self._started = (max(wall_s, entry.at_s), monotonic_s)  # time must not go back if the clock was set back
        self._show_machine()
        return n_events

    def _show_machine(self) -> None:
        self.daemon.metrics.buffered.set(self._machine.n_buffered)
        self.daemon.metrics.claims_bounded.set(len(self._machine.bounded))

    def _handle(self, event: Event, at_s: float) -> list[Command]:
        """Let the machine handle a journalled event, and count the outcome."""
        if self._first_at_s is None:
            self._first_at_s = at_s
        in_flight = self._machine.in_flight
        commands = self._machine.handle(event)
        combination = None
        if isinstance(event, Combined) and in_flight is not None:
            kept = tuple(part for part in in_flight.parts if contribution_id(part.head) not in event.quarantined)
            combination = replace(in_flight, parts=kept)
            self._count_combined(combination)
        for command in commands:
            if isinstance(command, Refuse):
                self._count_refused(command)
        self._note(Handled(event, at_s, at_s - self._first_at_s, commands, combination))
        return commands

    def _count_combined(self, combination: Combination) -> None:
        self.accepted += len(combination.parts)
        self.daemon.metrics.accepted.inc(len(combination.parts))
        for part in combination.parts:
            self.daemon.metrics.staleness.observe(part.staleness)

    def _count_refused(self, command: Refuse) -> None:
        """Count a refused message once, however often it is delivered."""
        if command.contribution_id in self._refused_ids:
            return
        self._refused_ids.add(command.contribution_id, None)
        reason = command.reason.value
        self.refused += 1
        self.refusals[reason] = self.refusals.get(reason, 0) + 1
        self.daemon.metrics.refused.labels(reason=reason).inc()

    async def _until_done(self, what: Callable[..., Awaitable[None]], identity: str, *arguments: object) -> None:
        while True:
            try:
                await what(identity, *arguments)
            except BusError as error:
                self.log.warning("not_settled", contribution=identity, error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)
            else:
                return

    def _say(self, command: ReportWaiting | ReportNotEvaluated | ReportBounded) -> None:
        if isinstance(command, ReportWaiting):
            self.daemon.metrics.waiting.inc()
            self.log.warning("waiting_for_sites", **asdict(command))
        elif isinstance(command, ReportBounded):
            self.log.warning("claim_bounded", **asdict(command))
            self.daemon.notices.add(What.CLAIM_BOUNDED, asdict(command))
        else:
            self.log.info("version_not_evaluated", **asdict(command))

    def _tell_accepted(self, combination: Combination, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Combined):
                kept = (part.head for part in combination.parts if contribution_id(part.head) not in event.quarantined)
                sources = sorted({admission.source(head) for head in kept})
                self.daemon.notices.add(What.ACCEPTED, {"sources": sources, "version": combination.version})

    def _start_timer(self, delay_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.feed_later(delay_s, DeadlineReached())

    def _now_s(self) -> float:
        """Return seconds since the epoch. Setting the system clock while the daemon runs does not change them."""
        wall_s, monotonic_s = self._started
        return wall_s + time.monotonic() - monotonic_s


async def _at_once() -> None:
    """Return at once: without a lease, a process may always settle."""
