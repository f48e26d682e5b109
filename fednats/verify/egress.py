"""Compares the participants' egress ledgers with what they sent: a chain alone cannot show that its end is missing."""

import hashlib
from collections.abc import Container, Sequence
from pathlib import Path

from fednats import wire
from fednats.ledger.audit import audit
from fednats.ledger.records import EGRESS_FILE, LEDGER_FILE
from fednats.verify.run_folder import RunFolder, shown
from fednats.verify.sent import SentUpdate


def check_site(
    state: Path, site: str, outbox: Sequence[SentUpdate], arrived: Container[str]
) -> tuple[list[str], list[str]]:
    """Return findings on the egress ledger of ``site`` in ``state``: a broken chain, and updates without a record.

    The second list has notes on records that a backup lacked. ``arrived`` has the ids that the site's region took in.
    Call this after reading the outbox, because records are written before updates are sent.
    """
    known = [item for item in outbox if not item.is_given_up]
    left = [item.head for item in known if item.head and (item.is_sent or item.update_id in arrived)]
    path = state / EGRESS_FILE
    if not path.exists():
        return [f"egress: {shown(path)} is missing: what left {site} cannot be verified"] if left else [], []
    found = audit(path)
    recorded = {(record.name, record.digest) for record in found.records if record.what == "update"}
    missing = [head.update_id for head in left if (head.update_id, _digest(wire.pack(head))) not in recorded]
    findings = [f"egress: {shown(path)}: {text}" for text in found.findings]
    findings += [f"egress: update {update_id} left {site} and is not in its ledger" for update_id in missing]
    return findings, [f"egress: {shown(path)}: {text}" for text in found.gaps]


def check_nodes(folder: RunFolder) -> list[str]:
    """Return findings on the chains of the aggregators' and the coordinator's ledgers."""
    ledgers = [state / LEDGER_FILE for state in folder.all]
    return [f"egress: {shown(path)}: {text}" for path in ledgers if path.exists() for text in audit(path).findings]


def _digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()
