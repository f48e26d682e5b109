"""Checks for `fednats audit` whether a ledger is complete, and who signed it.

The chain shows an altered byte, a record that is missing, inserted or moved, and a cut in the middle. It does not show
where it should end. The region's receipt beside the ledger shows records missing at the end, and so do the ledgers of
nodes that accepted contributions (`fednats.ledger.anchors`).
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fednats.crypto.signers import SignersFile
from fednats.crypto.signing import is_signature, public_key
from fednats.errors import ConfigError
from fednats.ledger.anchor import read_anchor
from fednats.ledger.anchors import against_ledger, against_receipt
from fednats.ledger.records import BEGIN, DOMAIN, MAX_LINE_BYTES, LedgerRecord, hash_of, parse

_FIRST = b'{"sequence":'

MAX_FINDINGS = 100
"""After this many findings, the rest of a file is not checked."""


@dataclass
class Audit:
    """The records of a ledger, and its problems."""

    path: Path
    records: list[LedgerRecord] = field(default_factory=list)
    """The records that could be read."""
    findings: list[str] = field(default_factory=list)
    """Problems, most with their line."""
    notes: list[str] = field(default_factory=list)

    @property
    def gaps(self) -> list[str]:
        """Gaps that the ledger itself reports: records missing from the backup that it was restored from."""
        return [f"record {record.sequence}: {record.detail}" for record in self.records if record.what == "restored"]

    def run_of(self, version: int | None) -> str:
        """Return the run of ``version``, from the records of kind ``run``; empty if none covers it."""
        begun = {record.version: record.name for record in self.records if record.what == "run"}
        first = max((at for at in begun if at is not None and version is not None and at <= version), default=None)
        return "" if first is None else begun[first]

    @property
    def n_bytes(self) -> Counter[str]:
        """Bytes sent, by kind of record."""
        counted: Counter[str] = Counter()
        for record in self.records:
            counted[record.what] += record.n_bytes
        return counted

    @property
    def epsilon(self) -> float | None:
        """Largest epsilon on record; None without differential privacy."""
        return max((record.epsilon for record in self.records if record.epsilon is not None), default=None)

    @property
    def line(self) -> str:
        """The totals in one line."""
        kinds = Counter(record.what for record in self.records)
        n_bytes = self.n_bytes
        parts = ", ".join(f"{kind} {count} ({n_bytes[kind]} bytes)" for kind, count in sorted(kinds.items()))
        by = ", ".join(sorted({record.by for record in self.records})) or "nobody"
        spent = "" if self.epsilon is None else f"; epsilon {self.epsilon:g}"
        n_findings = len(self.findings) + len(self.gaps)
        result = f"{n_findings} findings" if n_findings else "the chain is whole"
        return f"{len(self.records)} records by {by}: {parts or 'none'}{spent}; {result}"


def audit(path: Path, rosters: Sequence[SignersFile] = (), against: Sequence[Path] = ()) -> Audit:
    """Read the ledger at ``path`` and check it; ``rosters``, the run's signers, also show whose signatures count.

    ``against`` are ledgers of nodes that accepted contributions of this ledger's owner.

    Raises:
        ConfigError: a ledger, or the receipt, cannot be read.
    """
    anchor = read_anchor(path)  # before the ledger, which may be growing
    others = [read_ledger(other, rosters) for other in against]
    found = read_ledger(path, rosters)
    missing: list[str] = []
    if anchor is not None:
        missing += against_receipt(found.records, anchor, rosters)
    for held in others:
        missing += [f"{held.path.name}, which it is held against: {text}" for text in held.findings]
        missing += against_ledger(found.records, held.records)
    found.findings += missing[:MAX_FINDINGS]
    if len(missing) > MAX_FINDINGS:
        found.findings.append(f"and {len(missing) - MAX_FINDINGS} more that is missing")
    return found


def read_ledger(path: Path, rosters: Sequence[SignersFile] = ()) -> Audit:
    """Read one ledger and check its chain and signatures. Raises as `audit`."""
    found = Audit(path)
    expected, previous = 1, BEGIN
    for number, line in _lines(path):
        if len(found.findings) >= MAX_FINDINGS:
            found.findings.append(f"line {number}: the rest was not looked at")
            break
        if _is_cut_short(line):
            found.notes.append(
                f"line {number} is cut short: the daemon was ended while it wrote it, and nothing had left for it"
            )
            break
        try:
            record = parse(line)
        except ValueError as error:
            found.findings.append(f"line {number}: damaged or altered ({error})")
            expected, previous = expected + 1, ""
            continue
        found.records.append(record)
        found.findings += [f"line {number}: {problem}" for problem in _problems(record, expected, previous)]
        expected, previous = record.sequence + 1, record.hash
    _check_signers(found, rosters)
    if not rosters and found.records:
        keys = ", ".join(sorted({record.key for record in found.records}))
        found.notes.append(f"signed by {keys}; give --signers to see whose key that is")
    return found


def _is_cut_short(line: bytes) -> bool:
    """Return whether ``line`` is only the beginning of a record. A record with just a wrong line end was altered."""
    if line.endswith(b"\n") or not line.startswith(_FIRST[: len(line)]) or len(line) == MAX_LINE_BYTES:
        return False
    try:
        parse(line[:-1])
    except ValueError:
        return True
    return False


def _problems(record: LedgerRecord, expected: int, previous: str) -> Iterator[str]:
    if hash_of(record.model_dump(exclude={"hash", "signature"})) != record.hash:
        yield "altered, its hash is of something else"
    elif not _is_signed(record):
        yield f"its signature is not of the key {record.key}"
    if record.sequence > expected:
        yield f"record {record.sequence} where {expected} was expected: {record.sequence - expected} missing before it"
    elif record.sequence < expected:
        yield f"record {record.sequence} where {expected} was expected: out of order, or twice"
    elif previous and record.previous != previous:  # ``previous`` is empty after a line that could not be read
        yield f"record {record.sequence} does not follow the one before"


def _is_signed(record: LedgerRecord) -> bool:
    try:
        key = public_key(record.key)
    except ValueError:
        return False
    return is_signature(key, bytes.fromhex(record.signature), DOMAIN, record.by, bytes.fromhex(record.hash))


def _check_signers(found: Audit, rosters: Sequence[SignersFile]) -> None:
    """Report keys that do not belong to the run's signers."""
    if not rosters:
        return
    for by, key in dict.fromkeys((record.by, record.key) for record in found.records):
        lines = [record.sequence for record in found.records if (record.by, record.key) == (by, key)]
        where = f"records {lines[0]} to {lines[-1]}"
        if any(key in roster.revoked.get(by, ()) for roster in rosters):
            found.notes.append(f"{where} are signed with a key of {by} that has been revoked")
        elif all(roster.keys.get(by) != key for roster in rosters):
            found.findings.append(f"{where} are signed with {key}, which is not the key of {by}")


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with path.open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES):
                number += 1
                yield number, line
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a ledger, ...-ledger.jsonl") from error
