"""Restart a site whose state is from a backup, numbering its updates above those it sent since.

The region refuses an update number it has seen before. So when a site starts, it looks up its newest update in its
stream and the newest number in its region's receipts. If either is above its outbox, the site checks that no other
process sends in its name, then numbers its updates above both. Before the next pass it charges its privacy budget for
the updates sent since the backup (`fednats.privacy.guard`). An entry in the egress ledger says that it lacks them.
"""

import asyncio
import time
from pathlib import Path
from typing import Any

from fednats import subjects
from fednats.config import SiteSettings
from fednats.errors import CopiedSiteError, RefusedError, RestoreError
from fednats.ledger.anchor import missing_heads
from fednats.ledger.records import LedgerEntry
from fednats.messages import MAX_COUNT, Update
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.lifecycle import PRESENCE_RENEWAL_S
from fednats.services.daemon.retry import find
from fednats.storage.outbox import Outbox, RestoredOutbox, first_number
from fednats.transport.bus import Bus, StoredMessage

WATCHED_S = 2 * PRESENCE_RENEWAL_S
"""Seconds to watch for another process: a live one renews its presence within this time."""

_POLL_S = 0.5
_HIGHEST = MAX_COUNT // 2
"""No site reaches this update number: it would take 170 years."""


async def brought_up(
    bus: Bus, identity: Identity, settings: SiteSettings, outbox: Outbox, told: int, log: Any
) -> RestoredOutbox | None:
    """Bring ``outbox`` up to date with the bus; return what was found there, None if nothing is newer.

    ``told`` is the newest update number in the region's receipts.

    Raises:
        CopiedSiteError: another process sends as this site.
        RestoreError: the region names a number that no update can have.
    """
    newest = await _newest_own(bus, identity, settings, log)
    signed = 0 if newest is None else newest.sequence
    known, own = max(signed, told), await asyncio.to_thread(outbox.newest_number)
    if known <= own:
        return None
    if known >= _HIGHEST:
        raise RestoreError(
            f"region {settings.region} says that update number {known} of this site exists, the newest here is {own}; no"
            " site makes so many. Ask the region's operator to look at the receipts that it sends"
        )
    await _refuse_rival(bus, settings, own, known, log)
    base_version = -1 if newest is None else newest.base_version
    found = RestoredOutbox(
        first=max(first_number(time.time()), known + 2), own=own, signed=signed, known=known, base_version=base_version
    )
    await asyncio.to_thread(outbox.go_above, found)
    log.warning("restored_from_older_state", own_number=own, newest_number=known, next_number=found.first)
    return found


async def gap_in(ledger: Path, outbox: Outbox, found: RestoredOutbox | None) -> LedgerEntry | None:
    """Return the entry that says what ``ledger`` lacks since a backup; None if it lacks nothing, or says so already."""
    newest = await asyncio.to_thread(outbox.newest_ledger_head)
    missing = await asyncio.to_thread(missing_heads, ledger, newest)
    if found is None and not missing:
        return None
    numbers = "" if found is None else f"; updates {found.own + 1} to {found.known} of this site may be among it"
    named = f"; records that were named and are not here: {', '.join(missing)}" if missing else ""
    return LedgerEntry(
        "restored",
        detail=f"this ledger, or the state beside it, is from a backup: what left since is not here{numbers}{named}",
    )


# --- what the bus has -------------------------------------------------------------------------------------------------


async def _newest_own(bus: Bus, identity: Identity, settings: SiteSettings, log: Any) -> Update | None:
    """Return this site's newest update in the region's stream; None if there is none that opens with its key."""
    stream = subjects.updates_stream(settings.run, settings.region, settings.site)
    subject = subjects.head(subjects.update(settings.run, settings.region, settings.site))
    record = await find(log, lambda: bus.last(stream, subject))
    try:
        return None if record is None else identity.open(subject, record.data, Update)
    except RefusedError as error:  # an older key or release, or not from this site: the receipts have the number
        log.info("own_update_unreadable", reason=error.reason.value, detail=error.detail)
        return None


async def _refuse_rival(bus: Bus, settings: SiteSettings, own: int, known: int, log: Any) -> None:
    """Watch for another process that renews this site's presence. Raises CopiedSiteError if there is one."""
    bucket = subjects.presence_bucket(settings.run)
    key = f"$KV.{bucket}.{subjects.presence_key('site', settings.site)}"

    async def presence() -> StoredMessage | None:
        return await find(log, lambda: bus.last(f"KV_{bucket}", key))

    before = await presence()
    until_s = time.monotonic() + WATCHED_S
    while before is not None and time.monotonic() < until_s:
        await asyncio.sleep(_POLL_S)
        now = await presence()
        if now is None:
            return  # the presence has expired
        if now.sequence != before.sequence:
            raise CopiedSiteError(
                f"another process sends as {settings.site} now: the region knows its number {known}, the newest here is"
                f" {own}. End one of the two, and start the other one again"
            )
