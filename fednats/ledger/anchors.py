"""Checks whether a ledger has lost its end or was made anew, by comparing it with what others recorded of it.

There are two kinds of witness. One is the region's receipt beside a hospital's ledger (`fednats.ledger.anchor`). The
other is the ledger of the region's aggregator or of the coordinator: its ``accepted`` records name each accepted
contribution by digest, and for an update also the newest record of its site's ledger.
"""

from collections.abc import Iterator, Sequence

from fednats.crypto.signers import SignersFile
from fednats.crypto.signing import public_key, verified
from fednats.errors import RefusedError
from fednats.ledger.anchor import Anchor
from fednats.ledger.records import BEGIN, LedgerRecord
from fednats.permissions import user_name

_CUT = "the end of this ledger is missing, or it was made anew"
_IN_GAP = "it left in a gap that this ledger says it has, or the end of the ledger is missing"


def against_receipt(records: Sequence[LedgerRecord], anchor: Anchor, rosters: Sequence[SignersFile]) -> Iterator[str]:
    """Yield problems that the region's receipt shows; with ``rosters``, the region must have signed it."""
    region = user_name("aggregator", anchor.receipt.region)
    if rosters and not any(_is_signed(anchor, roster, region) for roster in rosters):
        yield f"the receipt beside it is not signed by {region}"
        return
    told = any(record.what == "restored" and anchor.head in record.detail for record in records)
    if not told and anchor.head not in {BEGIN, *(record.hash for record in records)}:
        yield f"{region} has countersigned record {anchor.head[:16]}..., which is not here: {_CUT}"


def against_ledger(records: Sequence[LedgerRecord], other: Sequence[LedgerRecord]) -> Iterator[str]:
    """Yield contributions that the node behind ``other`` accepted from this ledger's owner, but this ledger lacks."""
    senders = {f"from {by}" for by in {record.by for record in records}}
    left = {(record.name, record.digest) for record in records}
    hashes = {BEGIN, "", *(record.hash for record in records)}
    why = _IN_GAP if any(record.what == "restored" for record in records) else _CUT
    for record in other:
        if record.what != "accepted" or record.detail not in senders:
            continue
        where = f"{record.by} has accepted {record.name} (its record {record.sequence})"
        if (record.name, record.digest) not in left:
            yield f"{where}, which is not here: {why}"
        elif record.anchors not in hashes:
            yield f"{where}, which named record {record.anchors[:16]}... as the newest here, and that is not here: {why}"


def _is_signed(anchor: Anchor, roster: SignersFile, region: str) -> bool:
    keys = [roster.keys[region]] if region in roster.keys else []
    for nkey in (*keys, *roster.revoked.get(region, ())):
        try:
            verified(public_key(nkey), anchor.subject, anchor.signed)
        except RefusedError:
            continue
        return True
    return False
