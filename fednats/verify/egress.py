"""The ledgers of a run's participants, held against what they sent: a chain alone does not show that its end is missing."""

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
    """Return what is wrong with the egress ledger of ``site``, kept in ``state``: its chain, updates without a record.

    And, as notes, what it says of records that a backup did not have.

    ``arrived`` are ids that the site's region took in. Call it when the outbox has been read: records are written first.
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
    """Return what is wrong with the chains of the aggregators' and the coordinator's ledgers."""
    ledgers = [state / LEDGER_FILE for state in folder.all]
    return [f"egress: {shown(path)}: {text}" for path in ledgers if path.exists() for text in audit(path).findings]


def _digest(packed: bytes) -> str:
    return hashlib.sha256(packed).hexdigest()
