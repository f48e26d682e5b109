"""The exact ledger of a run: every accepted update is in exactly one sum, and every sum in exactly one version.

`verify` replays the journals of the coordinator and of all aggregators, reads the sites' outboxes and joins them. It
uses these words, for an update on its way to its region and for a sum on its way to the node above:

- *sent*: the bus has acknowledged a site's update as stored; a region has journalled that its sum is published.
- *under way*: sent and not taken in yet. Only the newest may be. A message handed to a daemon that is killed, or sent
  over a connection that breaks, is redelivered within seconds, and may be overtaken meanwhile.
- *undelivered*: under way to a node that knows that the run is closed, and still so after `OVERTAKEN_S` (see
  `settled`).
- *lost*: sent, never taken in, and overtaken: the receiver's journal continues for more than `OVERTAKEN_S` after it
  took in a later message of the same sender.
- *taken in*: journalled by the receiver. From then on it is *waiting*, *in a sum* (at the hub: in a version), *refused*
  for a reason, or *left over* when the run closed.
- *accepted*: an update in a sum that its region made. *Applied*: an update whose sum, through all tiers, is in a
  version.

A finding means that the books disagree or that honest work was lost, and makes the exit code 1. These are not findings:

- Refusals by a rule on heads: too stale, wrong grid, wrong key and the like.
- Quarantines. They are notes: honest updates may be affected, but anybody can recompute the rule, and `verify` does.
- Garbage. An update that no outbox knows was not made by a site's daemon; it is a note, even if it was summed.

These are findings: an update that its site made and the bus stored whole, refused as damaged; and a sum refused by the
node above for anything but its age (too stale, or of an earlier run) or its norm, because it contains honest updates.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from fednats.errors import Reason
from fednats.messages import Aggregate, Update
from fednats.protocol.coordinator import RunRecord, RunState
from fednats.protocol.sums import head_of, weigh
from fednats.storage.checkpoints import Checkpoint, checkpoints_folder, newest_checkpoint, weights_file
from fednats.storage.outbox import outbox_file
from fednats.storage.tensor_file import TensorFile, digest_of
from fednats.subjects import HUB
from fednats.verify.books import Book, Fate, Taken, became
from fednats.verify.egress import check_nodes, check_site
from fednats.verify.outbox import check_outbox
from fednats.verify.run_folder import JOURNAL, RunFolder
from fednats.verify.sent import SentUpdate, read_gaps, read_outbox

OVERTAKEN_S = 30.0
"""An unacknowledged message is redelivered after 8 s. This long after a later one arrived, an earlier one is lost."""

TOO_LATE = {Reason.TOO_STALE, Reason.EARLIER_RUN}
"""Reasons for which an honest sum is refused: the model has moved on."""

_POLL_S = 0.5

APPLIED = "applied"
UNDER_WAY = "under way"
LOST = "lost"
SENT = "sent"


@dataclass
class Books:
    """The result of `verify`."""

    updates: Counter[str] = field(default_factory=Counter)
    """Number of updates by their fate at their region."""
    sums: Counter[str] = field(default_factory=Counter)
    """Number of sums by their fate at the node above their region."""
    accepted: Counter[str] = field(default_factory=Counter)
    """Number of accepted updates by the fate of their sums; in the end all should be `APPLIED`."""
    n_weighed: int = 0
    """Number of heads of sums compared with the region's journal."""
    runs: list[str] = field(default_factory=list)
    """The versions of each run, one line per run."""
    findings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    undelivered: list[str] = field(default_factory=list)
    """Messages under way to nodes that know that the run is closed; `settled` makes them findings if they stay so."""

    @property
    def n_under_way(self) -> int:
        """Updates and sums that were sent and not yet taken in."""
        return self.updates[UNDER_WAY] + self.sums[UNDER_WAY]

    @property
    def line(self) -> str:
        """The result in one line."""
        terms = [f"{name} {count}" for name, count in sorted(self.accepted.items(), key=lambda t: t[0] != APPLIED)]
        result = f"{len(self.findings)} findings" if self.findings else "nothing lost, nothing twice"
        total = self.accepted.total()
        return f"accepted {total} = {' + '.join(terms) or 'applied 0'}; {self.n_weighed} sums weighed; {result}"


def verify(directory: Path) -> Books:
    """Verify the run in ``directory``, an output folder or the folder of the kits, while it runs or afterwards.

    Receivers are read before senders: whatever a receiver has, its sender has already written down.

    Raises:
        ConfigError: the folder holds no run.
    """
    folder = RunFolder(directory)
    ledger = Books()
    before = newest_checkpoint(checkpoints_folder(folder.coordinator))
    books = {HUB: Book(HUB, folder.coordinator / JOURNAL)}
    after = newest_checkpoint(checkpoints_folder(folder.coordinator))
    parents: dict[str, str] = {}
    for node in (nodes := [HUB]):  # grows during the loop, from the hub downwards
        below = books[node].roster.regions if node in books else frozenset()
        if node == HUB and not books[HUB].is_whole:
            below |= set(folder.regions)  # those that the readable part of the hub's journal may not name
        for region in sorted(below - parents.keys()):
            parents[region] = node
            nodes.append(region)
            file = folder.region(region) / JOURNAL
            if file.exists():
                books[region] = Book(region, file)
            else:
                ledger.findings.append(f"{file} is missing: what region {region} summed cannot be verified")
    files = {
        (region, site): outbox_file(folder.site(site)) for region, book in books.items() for site in sorted(book.sites)
    }
    outboxes = {key: read_outbox(file) for key, file in files.items()}
    gaps = {key: read_gaps(file) for key, file in files.items() if outboxes[key] is not None}
    ledger.runs = [_line(run) for run in books[HUB].runs]
    ledger.findings += [problem for book in books.values() for problem in book.problems]
    for book in books.values():
        findings, notes = _restorations(book)
        ledger.findings += findings
        ledger.notes += notes
    ledger.findings += _wrong_weights(folder.coordinator)
    for (region, site), outbox in outboxes.items():
        findings, notes = check_site(folder.site(site), site, outbox or (), books[region].taken)
        ledger.findings += findings
        ledger.notes += notes
    ledger.findings += check_nodes(folder)
    _Audit(ledger, books, parents, outboxes, gaps).run(before, after)
    return ledger


async def settled(directory: Path) -> Books:
    """Verify a run after nodes that know that it is closed have had time to take in everything sent to them.

    That takes seconds while the nodes run and the bus has the messages. Anything undelivered after `OVERTAKEN_S` is a
    finding: a node, a server or a link is down, or the message was lost with a store. Raises as `verify`.
    """
    until_s = time.monotonic() + OVERTAKEN_S
    while True:
        ledger = await asyncio.to_thread(verify, directory)
        if not ledger.undelivered or time.monotonic() >= until_s:
            ledger.findings += ledger.undelivered
            return ledger
        await asyncio.sleep(_POLL_S)


class _Audit:
    """Joins the books of one run."""

    def __init__(
        self,
        ledger: Books,
        books: dict[str, Book],
        parents: dict[str, str],
        outboxes: dict[tuple[str, str], list[SentUpdate] | None],
        gaps: dict[tuple[str, str], list[range]],
    ) -> None:
        self._ledger = ledger
        self._books = books
        self._parents = parents
        self._outboxes = outboxes
        self._gaps = gaps
        self._lost: set[str] = set()

    def run(self, before: Checkpoint | None, after: Checkpoint | None) -> None:
        self._check_checkpoint(before, after)
        for region in self._parents:
            if region in self._books:
                self._check_sums(self._books[region], self._books[self._parents[region]])
        for (region, site), outbox in self._outboxes.items():
            self._check_site(self._books[region], site, outbox)
        self._count()

    def _find(self, text: str) -> None:
        self._ledger.findings.append(text)

    # --- the hub ------------------------------------------------------------------------------------------------------

    def _check_checkpoint(self, before: Checkpoint | None, after: Checkpoint | None) -> None:
        """Check the newest checkpoint, as read before and after the hub's journal."""
        hub = self._books[HUB]
        if not hub.is_whole:
            return
        made = [identity for identity, version in hub.made.items() if version.is_done]
        newest = hub.n_versions - 1  # according to the journal
        pending = hub.is_opening  # killed between opening a run and journalling its first version
        if after is None or after.version < newest - pending:
            self._find(
                f"checkpoint: the journal has {newest} versions, the newest on disk is {after and after.version}"
            )
        if before is None or not before.made_by:
            return
        version, made_by = before.version, before.made_by
        in_flight = hub.in_flight.combination_id if hub.in_flight is not None else None
        if version == newest + 1 and made_by == in_flight:
            hub.finish(made_by, before.quarantined)  # killed between applying the version and journalling it
        elif version > newest or made_by not in made:
            self._find(f"checkpoint: version {version} was made by {made_by}, which the journal does not say")

    # --- sums ---------------------------------------------------------------------------------------------------------

    def _check_sums(self, book: Book, above: Book) -> None:
        region = book.node
        arrived = {identity: taken for identity, taken in above.taken.items() if taken.head.region == region}
        for identity, taken in arrived.items():
            if identity in book.made:
                if not book.made[identity].is_done:  # killed between publishing the sum and journalling it
                    book.finish(identity)
                self._compare(book, identity, taken.head)
            elif taken.fate is not Fate.REFUSED and book.is_whole:
                why = "gave up" if identity in book.failed else "did not make"
                self._find(f"unknown: {above.node} took in sum {identity}, which {region} {why}")
            if taken.reason is Reason.OUTLIER:
                self._ledger.notes.append(
                    f"quarantined: sum {identity} of {region} by {above.node}: its norm is an outlier"
                )
            elif taken.fate is Fate.REFUSED and taken.reason not in TOO_LATE and identity in book.made:
                self._find(f"refused: sum {identity} of {region} by {above.node}: {taken.reason}")
            self._check_once(f"sum {identity} of {region}", taken)
        sent = [identity for identity, made in book.made.items() if made.is_done]
        self._note_sent(self._ledger.sums, sent, above, f"sum {{}} of {region}")
        self._tally(self._ledger.sums, arrived.values())

    def _compare(self, book: Book, identity: str, received: Update | Aggregate) -> None:
        """Recompute the head of a sum and compare it."""
        made = book.made[identity]
        if made.capacity is None or made.combination is None or not isinstance(received, Aggregate):
            self._find(f"weights: {identity} of {book.node} is no sum of a region")
            return
        weights = weigh(made.combination, made.capacity)
        expected = head_of(book.run, book.node, made.combination, weights, received.payload)
        self._ledger.n_weighed += 1
        different = [
            f"{name} is {getattr(received, name)}, the region's journal gives {getattr(expected, name)}"
            for name in type(received).model_fields.keys() - {"release"}  # which here is this process's
            if getattr(received, name) != getattr(expected, name)
        ]
        if different:
            self._find(f"weights: sum {identity} of {book.node}: {'; '.join(different)}")

    # --- updates ------------------------------------------------------------------------------------------------------

    def _check_site(self, book: Book, site: str, outbox: list[SentUpdate] | None) -> None:
        arrived = {
            identity: taken
            for identity, taken in book.taken.items()
            if isinstance(taken.head, Update) and taken.head.site == site
        }
        self._tally(self._ledger.updates, arrived.values())
        for identity, taken in arrived.items():
            self._check_once(f"update {identity} of {site}", taken)
        if outbox is None:
            if arrived:
                self._find(f"site-{site}/outbox.sqlite is missing: the updates of {site} cannot be verified")
            return
        findings, notes = check_outbox(book.node, site, outbox, self._gaps[book.node, site], arrived)
        self._ledger.findings += findings
        self._ledger.notes += notes
        sent = [item.update_id for item in outbox if item.head and (item.is_sent or item.update_id in arrived)]
        self._note_sent(self._ledger.updates, sent, book, f"update {{}} of {site}")

    # --- sums and updates ---------------------------------------------------------------------------------------------

    def _note_sent(self, counts: Counter[str], sent: list[str], receiver: Book, what: str) -> None:
        """Count the sent messages and those that did not arrive; ``what`` is a format for an id."""
        missing, lost = _missing(sent, receiver)
        if not receiver.is_whole:
            lost = set()  # it may have arrived after the readable part of the journal
        self._lost |= lost
        for identity in lost:
            why = ", or was settled there before a backup was restored" if receiver.restored_s else ""
            self._find(f"lost: {what.format(identity)} was overtaken and never came to {receiver.node}{why}")
        if receiver.is_closed and receiver.is_whole:
            self._ledger.undelivered += [
                f"undelivered: {what.format(identity)} has not come to {receiver.node}, which knows that the run is"
                " closed; start again what is down on its way, or it was lost with a store"
                for identity in sent
                if identity in missing - lost
            ]
        counts[SENT] += len(sent)
        counts[UNDER_WAY] += len(missing - lost)
        counts[LOST] += len(lost)

    def _check_once(self, what: str, taken: Taken) -> None:
        if len(taken.sums) > 1:
            self._find(f"twice: {what} is in {', '.join(taken.sums)}")

    def _tally(self, counts: Counter[str], all_taken: Iterable[Taken]) -> None:
        counts.update(became(taken) for taken in all_taken)

    def _count(self) -> None:
        """Follow every accepted update upwards."""
        for book in self._books.values():
            for taken in book.taken.values():
                if isinstance(taken.head, Update) and taken.fate is Fate.SUMMED:
                    self._ledger.accepted[self._end_of(book.node, taken)] += 1

    def _end_of(self, node: str, taken: Taken) -> str:
        while taken.fate is Fate.SUMMED:
            if node == HUB:
                return APPLIED
            node = self._parents[node]
            above = self._books[node].taken.get(taken.sums[0])
            if above is None:
                return f"{LOST if taken.sums[0] in self._lost else UNDER_WAY} above"
            taken = above
        return f"{taken.fate.value} above"


def _restorations(book: Book) -> tuple[list[str], list[str]]:
    """Return findings and notes on what a node made before a backup was restored."""
    if not book.restored_s:
        return [], []
    n_noted = sum(made.is_noted for made in book.made.values()) - len(book.unknown)
    note = (
        f"restored: {book.node} from a backup; {n_noted} combinations that its journal lacks are known from its notes"
    )
    findings = [f"restored: what versions {book.unknown} were made of is not known"] if book.unknown else []
    return findings, [note]


def _line(run: RunRecord) -> str:
    """Return the versions of ``run`` and its state as one line."""
    became = f"closed: {run.reason}" if run.state is RunState.CLOSED else run.state.name.lower()
    went_on = run.opening.opened_at > run.opening.first_version
    extended = f", extended at version {run.opening.opened_at}" if went_on else ""
    return f"run {run.opening.name}: versions {run.opening.first_version} to {run.last_version}{extended}, {became}"


def _missing(sent: list[str], receiver: Book) -> tuple[set[str], set[str]]:
    """Return the ids of ``sent`` (in sending order) that did not arrive, and those of them that are lost."""
    missing, lost = set(), set()
    later_s = float("inf")
    for identity in reversed(sent):
        taken = receiver.taken.get(identity)
        if taken is not None:
            later_s = min(later_s, taken.at_s)
            continue
        missing.add(identity)
        if receiver.end_s - later_s > OVERTAKEN_S:
            lost.add(identity)
    return missing, lost


def _wrong_weights(coordinator: Path) -> list[str]:
    """Return a finding if the digest of the newest version's weights is not the announced one."""
    folder = checkpoints_folder(coordinator)
    newest = newest_checkpoint(folder)
    if newest is None:
        return []
    with TensorFile.read(weights_file(folder, newest.version)) as weights:
        return (
            []
            if digest_of(weights) == newest.weights_digest
            else [f"checkpoint: the weights of version {newest.version} are not those announced: another digest"]
        )
