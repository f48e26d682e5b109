"""Send each site of a region signed receipts with the verdicts on its updates, on the site's own subject.

The newest receipt of a site stays in a stream, so a site that was away reads it when it returns. Receipts can be made
again from the journal, so a lost one holds nothing up.
"""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

from fednats import subjects, wire
from fednats.errors import BusError, Reason
from fednats.messages import MAX_DETAIL, MAX_VERDICTS, NO_RECORD, Outcome, Receipt, Update, Verdict
from fednats.protocol.events import ContributionArrived, Refuse, Settle
from fednats.protocol.settled import Newest
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.retry import RETRY_S
from fednats.services.tier.tier import Handled
from fednats.transport.bus import Bus, Delivery


@dataclass(frozen=True, slots=True)
class _Waiting:
    """An update that is not judged yet, as far as its receipt will name it."""

    site: str
    sequence: int
    ledger_head: str


class Receipts:
    """Collects the verdicts on the updates of one region's sites, and publishes them."""

    def __init__(self, bus: Bus, identity: Identity, run: str, region: str, log: Any) -> None:
        self._bus = bus
        self._identity = identity
        self._run = run
        self._region = region
        self._log = log
        self._waiting: dict[str, _Waiting] = {}
        """Updates taken in but not judged yet, by id."""
        self._judged: Newest[None] = Newest()
        self._verdicts: dict[str, deque[Verdict]] = {}
        """Verdicts by site, the newest last."""
        self._unsent: dict[str, None] = {}
        self._to_send = asyncio.Event()

    def note(self, handled: Handled) -> None:
        """Take in what the machine decided, live or in a replay."""
        event = handled.event
        if isinstance(event, ContributionArrived) and isinstance(event.head, Update):
            self._take_in(event.head)
        if handled.combination is not None:
            for part in handled.combination.parts:
                if isinstance(part.head, Update):
                    self._judge(part.head.update_id, "accepted")
        for command in handled.commands:
            if isinstance(command, Refuse):
                self._judge(command.contribution_id, "refused", command.reason, command.detail)
            elif isinstance(command, Settle):
                for identity in command.ids:
                    self._judge(identity, "left_over")

    def note_unreadable(self, delivery: Delivery, refuse: Refuse) -> None:
        """Take in that a message on an update's subject could not be read. The verdict names it by its message id."""
        head = subjects.head(subjects.update(self._run, self._region, site := subjects.sender(delivery.subject)))
        if delivery.subject != head:
            return
        self._add(site, _verdict(wire.message_id(delivery.data), "refused", refuse.reason, refuse.detail))

    async def send(self) -> None:
        """Publish a receipt for each site with a new verdict, forever."""
        while True:
            await self._to_send.wait()
            self._to_send.clear()
            sites, self._unsent = list(self._unsent), {}
            for site in sites:
                try:
                    await self._publish(site)
                except BusError as error:
                    self._log.warning("receipt_not_sent", site=site, error=str(error), retry_s=RETRY_S)
                    self._unsent[site] = None
            if self._unsent:
                await asyncio.sleep(RETRY_S)
                self._to_send.set()

    async def _publish(self, site: str) -> None:
        receipt = Receipt(run=self._run, region=self._region, site=site, verdicts=tuple(self._verdicts[site]))
        subject = subjects.receipt(self._run, self._region, site)
        signed = self._identity.sign(subject, receipt)
        await self._bus.publish(subject, signed, wire.message_id(signed))

    # --- inside -------------------------------------------------------------------------------------------------------

    def _take_in(self, head: Update) -> None:
        if head.update_id in self._judged:
            self._mark(head.site)  # delivered again: perhaps the receipt was lost
        else:
            self._waiting.setdefault(head.update_id, _Waiting(head.site, head.sequence, head.ledger_head))

    def _judge(self, update_id: str, outcome: Outcome, reason: Reason | None = None, detail: str = "") -> None:
        waiting = self._waiting.pop(update_id, None)
        if waiting is None:
            return
        self._judged.add(update_id, None)
        self._add(
            waiting.site,
            _verdict(update_id, outcome, reason, detail, waiting.sequence, ledger_head=waiting.ledger_head),
        )

    def _add(self, site: str, verdict: Verdict) -> None:
        verdicts = self._verdicts.setdefault(site, deque(maxlen=MAX_VERDICTS))
        if verdict not in verdicts:
            verdicts.append(verdict)
        self._mark(site)

    def _mark(self, site: str) -> None:
        if site in self._verdicts:
            self._unsent[site] = None
            self._to_send.set()


def _verdict(
    name: str,
    outcome: Outcome,
    reason: Reason | None,
    detail: str,
    sequence: int = 0,
    *,
    ledger_head: str = NO_RECORD,
) -> Verdict:
    return Verdict(
        name=name,
        sequence=sequence,
        outcome=outcome,
        reason="" if reason is None else reason.value,
        detail=detail[:MAX_DETAIL],
        ledger_head=ledger_head,
    )
