"""A site whose state is from a backup: what it may have sent since, and from which number it goes on.

The region refuses an update whose number it knows. So a site looks, when it starts, for its newest update in its
stream and for the newest number in its region's receipts. If they are above its outbox, it makes sure that no other process
sends as this site, and goes on above them. What the updates since the backup cost of its privacy budget is charged before
the next pass (`fednats.privacy.guard`); that its egress ledger lacks them goes on that ledger.
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
"""A process that is there renews its presence within so long."""

_POLL_S = 0.5
_HIGHEST = MAX_COUNT // 2
"""No site gets to this number: it would take 170 years."""


async def brought_up(
    bus: Bus, identity: Identity, settings: SiteSettings, outbox: Outbox, told: int, log: Any
) -> RestoredOutbox | None:
    """Let ``outbox`` go on above what the bus has of this site; return what was found, None if nothing is newer there.

    ``told`` is the newest number that the region has named.

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
    """Return what goes on ``ledger`` if it lacks what left since a backup; None if it lacks nothing, or says so already."""
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
    """Return the newest update in the region's stream that this site has signed."""
    stream = subjects.updates_stream(settings.run, settings.region, settings.site)
    subject = subjects.head(subjects.update(settings.run, settings.region, settings.site))
    record = await find(log, lambda: bus.last(stream, subject))
    try:
        return None if record is None else identity.open(subject, record.data, Update)
    except RefusedError as error:  # of an earlier key or release, or not of this site: the receipts have the number
        log.info("own_update_unreadable", reason=error.reason.value, detail=error.detail)
        return None


async def _refuse_rival(bus: Bus, settings: SiteSettings, own: int, known: int, log: Any) -> None:
    """Look whether another process renews this site's presence. Raises CopiedSiteError."""
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
            return  # it has expired
        if now.sequence != before.sequence:
            raise CopiedSiteError(
                f"another process sends as {settings.site} now: the region knows its number {known}, the newest here is"
                f" {own}. End one of the two, and start the other one again"
            )
