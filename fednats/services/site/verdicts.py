"""Follow the region's receipts for a site's updates, and react to refusals."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from fednats import subjects, wire
from fednats.config import SiteSettings
from fednats.errors import CopiedSiteError, LocalStorageError, Reason, RefusedError
from fednats.ledger.anchor import keep_anchor, read_anchor
from fednats.ledger.records import EGRESS_FILE
from fednats.messages import MAX_VERDICTS, Receipt, Update, Verdict
from fednats.protocol.refusals import Pauses, newest_known, sent_by_another
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.retry import find
from fednats.storage.outbox import Outbox, first_number
from fednats.transport.bus import Bus, StoredMessage

LOOKED_AT = 4 * MAX_VERDICTS
"""Newest own updates to compare verdicts with: more than one receipt can name."""

UNKNOWN = "unknown"
"""Counted in place of a reason that this release does not know, so a region cannot make up metric labels."""

REFUSED = "refused"
"""Key in `Daemon.declined` for a site whose updates are refused."""


class Verdicts:
    """Follows the receipts of one site. Calls ``changed`` when the site pauses training or may train again."""

    def __init__(
        self,
        daemon: Daemon,
        settings: SiteSettings,
        identity: Identity,
        bus: Bus,
        outbox: Outbox,
        changed: Callable[[], None],
    ) -> None:
        self._daemon = daemon
        self._log = daemon.log
        self._settings = settings
        self._identity = identity
        self._bus = bus
        self._outbox = outbox
        self._changed = changed
        self._stream = subjects.receipts_stream(settings.run, settings.region)
        self._subject = subjects.receipt(settings.run, settings.region, settings.site)
        self._ledger = settings.state_dir / EGRESS_FILE
        self._seen: set[Verdict] = set()
        self._pauses = Pauses()
        self._until_s = 0.0
        self._why = ""
        self.refused: dict[str, int] = {}
        """Number of refusals since this process started, by reason."""

    @property
    def pause_left_s(self) -> float:
        """Seconds until the site may train again after a refusal; 0 if it may now."""
        return max(0.0, self._until_s - time.monotonic())

    async def begin(self) -> int:
        """Read the newest receipt before training begins; return the newest number that the region knows, 0 for none.

        If it is above the newest number here, the state is from a backup, or another process sends as this site.
        """
        stored = await asyncio.to_thread(read_anchor, self._ledger)
        if stored is not None:
            self._seen.update(stored.receipt.verdicts)
        record = await find(self._log, lambda: self._bus.last(self._stream, self._subject))
        receipt = None if record is None else self._opened(record)
        if record is None or receipt is None:
            return 0
        own = await asyncio.to_thread(self._own)
        fresh = [verdict for verdict in receipt.verdicts if verdict not in self._seen]
        await self._take_in(receipt, fresh, own, record.data)
        newest_here = await asyncio.to_thread(self._outbox.newest_number)
        return newest_known(receipt.verdicts, fresh, own.keys(), newest_here)

    async def follow(self) -> None:
        """Take in receipts, forever.

        Raises:
            CopiedSiteError: the receipts show that another process sends as this site.
        """
        async for record in self._bus.follow(self._stream, [self._subject]):
            if (receipt := self._opened(record)) is not None:
                own = await asyncio.to_thread(self._own)
                await asyncio.to_thread(self._refuse_copy, receipt, own)
                fresh = [verdict for verdict in receipt.verdicts if verdict not in self._seen]
                await self._take_in(receipt, fresh, own, record.data)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _opened(self, record: StoredMessage) -> Receipt | None:
        try:
            return self._identity.open(record.subject, record.data, Receipt)
        except RefusedError as error:
            self._daemon.metrics.refused.labels(reason=error.reason.value).inc()
            self._log.warning("receipt_refused", reason=error.reason.value, detail=error.detail)
            return None

    async def _take_in(self, receipt: Receipt, fresh: list[Verdict], own: Mapping[str, Update], signed: bytes) -> None:
        for verdict in fresh:
            self._note(verdict, receipt.release, is_own=verdict.name in own)
        self._seen = set(receipt.verdicts)
        if fresh:
            await self._keep(signed)

    def _own(self) -> dict[str, Update]:
        """Return the newest own updates, keyed both by update id and by message id."""
        subject = subjects.head(subjects.update(self._settings.run, self._settings.region, self._settings.site))
        updates = self._outbox.newest(LOOKED_AT)
        by_message = {wire.message_id(self._identity.sign(subject, update)): update for update in updates}
        return {**by_message, **{update.update_id: update for update in updates}}

    def _refuse_copy(self, receipt: Receipt, own: Mapping[str, Update]) -> None:
        newest = self._outbox.newest_number() or first_number(time.time())
        fresh = [verdict for verdict in receipt.verdicts if verdict not in self._seen or verdict.name not in own]
        if (what := sent_by_another(fresh, own.keys(), newest)) is not None:
            raise CopiedSiteError(
                f"another process sends as {self._settings.site}, or this state_dir is an old copy: {what}. Stop the other"
                " one, if there is one, and start this one again: it then goes on above the numbers that its region knows"
            )

    def _note(self, verdict: Verdict, release: str, *, is_own: bool) -> None:
        if verdict.outcome == "accepted" and is_own:
            self._pauses.accepted()
            if self._why:
                self._train_again()
        if verdict.outcome != "refused":
            return
        fields: dict[str, Any] = {"update_id": verdict.name, "reason": verdict.reason, "detail": verdict.detail}
        if not is_own:  # anyone with this site's bus key can send in its name, but nothing counts without its signature
            self._log.warning("refused_in_our_name", **fields)
            return
        reason = _reason(verdict)
        name = UNKNOWN if reason is None else reason.value
        self._daemon.metrics.refused_by_region.labels(reason=name).inc()
        self.refused[name] = self.refused.get(name, 0) + 1
        pause_s = self._pauses.refused(reason)
        self._log.warning("update_refused", **fields, region_release=release, pause_s=pause_s)
        if pause_s:
            self._until_s = time.monotonic() + pause_s
            self._why = f"its region refuses its updates, {verdict.reason}: {verdict.detail}"
            self._daemon.declined[REFUSED] = {f"site.{self._settings.site}": self._why}
            asyncio.get_running_loop().call_later(pause_s + 0.1, self._look_again)
            self._changed()

    def _look_again(self) -> None:
        if self._why and not self.pause_left_s:
            self._train_again()

    def _train_again(self) -> None:
        self._until_s, self._why = 0.0, ""
        self._daemon.declined.pop(REFUSED, None)
        self._log.info("training_resumes")
        self._changed()

    async def _keep(self, signed: bytes) -> None:
        try:
            await asyncio.to_thread(keep_anchor, self._ledger, signed)
        except LocalStorageError as error:
            self._log.warning("receipt_not_kept", error=str(error))


def _reason(verdict: Verdict) -> Reason | None:
    """Return the reason of a refusal; None if this release does not know it."""
    return Reason(verdict.reason) if verdict.reason in set(Reason) else None
