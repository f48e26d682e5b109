"""Compares a site's outbox with what its region took in."""

from collections.abc import Sequence
from itertools import pairwise

from fednats.errors import Reason
from fednats.messages import Update
from fednats.protocol.compositions import without_digests
from fednats.verify.books import Fate, Taken, became
from fednats.verify.sent import SentUpdate

DAMAGED = {Reason.CHECKSUM, Reason.CIPHERTEXT}
"""Reasons for which an honest update is never refused."""


def check_outbox(
    region: str, site: str, outbox: Sequence[SentUpdate], gaps: Sequence[range], arrived: dict[str, Taken]
) -> tuple[list[str], list[str]]:
    """Return findings and notes on the outbox of ``site``; ``gaps`` are the numbers it lacks because of a backup."""
    findings = [*_unread(site, outbox), *_numbers(site, outbox, gaps)]
    notes = []
    lacking = _not_in_backup(outbox, gaps, arrived) if gaps else set()
    if gaps:
        notes.append(
            f"restored: {site} from a backup; {len(lacking)} updates that it lacks are known from the journal of {region}"
        )
    own = {item.update_id: item for item in outbox}
    for identity, taken in arrived.items():
        if identity in lacking:
            continue
        if (item := own.get(identity)) is None:
            notes.append(
                f"update {identity} came in the name of {site}, whose outbox does not know it: {became(taken)}"
            )
        elif (problem := _differs(item, taken)) is not None:
            findings.append(problem.format(f"update {identity} of {site}"))
    return findings, notes


def _unread(site: str, outbox: Sequence[SentUpdate]) -> list[str]:
    unread = [item for item in outbox if item.head is None]
    return [
        f"unreadable: {len(unread)} updates in the outbox of {site}, such as {item.update_id}: {item.problem};"
        " verify them with the release of their sender"
        for item in unread[:1]
    ]


def _numbers(site: str, outbox: Sequence[SentUpdate], gaps: Sequence[range]) -> list[str]:
    sequences = [item.sequence for item in outbox]
    begun = {gap.stop for gap in gaps}
    if all(after == before + 1 or after in begun for before, after in pairwise(sequences)):
        return []
    return [f"outbox: the updates of {site} are numbered {sequences}, with a gap"]


def _not_in_backup(outbox: Sequence[SentUpdate], gaps: Sequence[range], arrived: dict[str, Taken]) -> set[str]:
    """Return the ids among ``arrived`` that were sent after the backup and before it was restored."""
    given_up = {item.update_id for item in outbox if item.is_given_up}
    return {
        identity
        for identity, taken in arrived.items()
        if identity in given_up or (isinstance(taken.head, Update) and any(taken.head.sequence in gap for gap in gaps))
    }


def _differs(item: SentUpdate, taken: Taken) -> str | None:
    """Return the problem with an update that its region took in, as a format for its name; None if there is none."""
    head = item.head
    if head is not None and head != taken.head and not (taken.is_noted and _as_noted(head) == taken.head):
        return "altered: {} is not what its outbox has"
    if item.is_dropped and taken.fate is Fate.SUMMED:
        return "twice: {} was dropped, its changes stay at the site, and is summed"
    if taken.reason in DAMAGED:
        return f"damaged: {{}} was sent whole and refused: {taken.reason}"
    return None


def _as_noted(head: Update) -> Update:
    return head.model_copy(update={"payload": without_digests(head.payload)})
