"""The egress ledger: one signed record of everything that leaves, each chained to the one before.

Each line is a record: compact JSON in the field order of `LedgerRecord`. ``hash`` is SHA-256 of the line without
``hash`` and ``signature``; ``previous`` is the hash of the record before. The signature (Ed25519, the participant's
nkey) covers the hash. Nobody without the key can alter, drop, insert or reorder records. The holder of the key can, but
must make all later records anew.

A record is on disk before the first byte it covers leaves. It records an *attempt*: if the daemon is killed in between,
the bytes may leave later, or twice, and then two records have one name. A line that is cut short was not on disk when
the daemon was killed, so nothing had left for it; the next start removes it.
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fednats.config import Token
from fednats.crypto.signing import Signer
from fednats.errors import ConfigError, LocalStorageError
from fednats.messages import NO_RECORD

EGRESS_FILE = "egress-ledger.jsonl"
"""File name of a hospital's ledger."""

LEDGER_FILE = "ledger.jsonl"
"""File name of an aggregator's or the coordinator's ledger, which has what it accepted and published."""

DOMAIN = b"fednats ledger record 1"
"""Domain of a record's signature."""

BEGIN = NO_RECORD
"""``previous`` of the first record."""

MAX_LINE_BYTES = 64 * 1024

_HASH = r"^[0-9a-f]{64}$"
_MOST = 2**60


@dataclass(frozen=True)
class LedgerEntry:
    """Content of a record to append."""

    what: str
    """Kind: ``started``, ``restored``, ``run``, ``update``, ``evaluation``, ``other``; other nodes have more kinds."""
    version: int | None = None
    """Model version it belongs to."""
    name: str = ""
    """Id of the update, sum or payload."""
    n_messages: int = 0
    n_bytes: int = 0
    """Payload bytes of these messages, without subjects, headers, and the overhead of NATS and TLS."""
    digest: str = ""
    """SHA-256 of the message without its signature; the message names all its chunks by digest."""
    epsilon: float | None = None
    """Epsilon spent on any one record so far, this update included; None if infinite or if the run has no noise."""
    anchors: str = ""
    """For an accepted update: the newest record of its site's ledger, as named by the update."""
    detail: str = ""


class LedgerRecord(BaseModel):
    """One line of a ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    sequence: int = Field(ge=1, le=_MOST)
    at: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00$", description="by this machine's clock")
    run: Token
    by: str = Field(pattern=r"^[a-z]+\.[A-Za-z0-9_-]{1,64}$", description="participant, site.NAME")
    key: str = Field(pattern=r"^[A-Z2-7]{56}$", description="its public nkey")
    what: str = Field(pattern=r"^[a-z_]{1,32}$")
    version: int | None = Field(ge=0, le=_MOST)
    name: str = Field(pattern=r"^[A-Za-z0-9_-]{0,64}$")
    n_messages: int = Field(ge=0, le=_MOST)
    n_bytes: int = Field(ge=0, le=_MOST)
    digest: str = Field(pattern=r"^([0-9a-f]{64})?$")
    epsilon: float | None
    anchors: str = Field(pattern=r"^([0-9a-f]{64})?$")
    detail: str = Field(pattern=r"^[ -~]{0,500}$")
    previous: str = Field(pattern=_HASH)
    hash: str = Field(pattern=_HASH)
    signature: str = Field(pattern=r"^[0-9a-f]{128}$")


class EgressLedger:
    """Append-only file of one participant; an appended record survives a crash of the machine."""

    def __init__(self, path: Path, signer: Signer, by: str, run: str) -> None:
        """Open or begin the ledger at ``path``; remove a last line that was cut short.

        Raises:
            ConfigError: its last record cannot be read.
            LocalStorageError: it cannot be opened.
        """
        self._path = path
        self._signer = signer
        self._by = by
        self._run = run
        self._using = threading.Lock()
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self.n_bytes = os.fstat(self._file).st_size
            removed, last = self._mend()
            _sync_folder(path.parent)
        except OSError as error:
            raise LocalStorageError(f"{path}: {error}; what leaves cannot be recorded, so nothing leaves") from error
        self.n_records = 0 if last is None else last.sequence
        self._previous = BEGIN if last is None else last.hash
        self.removed_bytes = removed
        """Bytes of a line that was cut short when the daemon was killed, now removed."""

    @property
    def head(self) -> str:
        """Hash of the newest record."""
        return self._previous

    def append(self, *entries: LedgerEntry) -> None:
        """Write one record per entry; all are on disk on return. Safe to call from any thread.

        Raises:
            LocalStorageError: the disk is full or broken; nothing was recorded, so none of it may leave.
        """
        with self._using:
            lines, sequence, previous = b"", self.n_records, self._previous
            for entry in entries:
                sequence += 1
                record = self._record(sequence, previous, entry)
                previous = record.hash
                lines += line_of(record)
            try:
                _write(self._file, lines)
                os.fsync(self._file)
            except OSError as error:
                os.ftruncate(self._file, self.n_bytes)  # otherwise the next record would follow half a line
                raise LocalStorageError(
                    f"{self._path}: {error}; what cannot be recorded does not leave: make room on its disk"
                ) from error
            self.n_records, self._previous = sequence, previous
            self.n_bytes += len(lines)

    def close(self) -> None:
        """Close the file after any write in progress."""
        with self._using:
            os.close(self._file)

    def _record(self, sequence: int, previous: str, entry: LedgerEntry) -> LedgerRecord:
        content = {
            "sequence": sequence,
            "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "run": self._run,
            "by": self._by,
            "key": self._signer.public_key,
            **asdict(entry),
            "previous": previous,
        }
        digest = hash_of(content)
        signature = self._signer.signature(DOMAIN, self._by, bytes.fromhex(digest))
        return LedgerRecord.model_validate({**content, "hash": digest, "signature": signature.hex()})

    def _mend(self) -> tuple[int, LedgerRecord | None]:
        """Remove a last line without a line end; return its length, and the last record."""
        start = max(0, self.n_bytes - 2 * MAX_LINE_BYTES)
        tail = os.pread(self._file, self.n_bytes - start, start)
        removed = len(tail) - (tail.rfind(b"\n") + 1)
        if removed:
            self.n_bytes -= removed
            os.ftruncate(self._file, self.n_bytes)
            os.fsync(self._file)
        lines = tail[: len(tail) - removed].split(b"\n")[:-1]
        if not lines:
            if self.n_bytes:
                raise self._damaged("no line ends in its last part")
            return removed, None
        try:
            return removed, parse(lines[-1])
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, why: str) -> ConfigError:
        return ConfigError(
            f"{self._path}: its last record cannot be read ({why}); `fednats audit verify` says where it is damaged."
            " Keep it elsewhere as it is, and a new one is begun"
        )


def hash_of(content: Mapping[str, Any]) -> str:
    """Return a record's hash, hexadecimal SHA-256; ``content`` is all fields before the hash, in order."""
    return hashlib.sha256(_compact(content)).hexdigest()


def line_of(record: LedgerRecord) -> bytes:
    """Return a record as its line in the file."""
    return _compact(record.model_dump()) + b"\n"


def parse(line: bytes) -> LedgerRecord:
    """Read one line, with or without its line end. Raises ValueError if it is not exactly as written."""
    try:
        record = LedgerRecord.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}" if where else str(first["msg"])) from None
    if line_of(record) != line.removesuffix(b"\n") + b"\n":
        raise ValueError("not in the form that records are written in")
    return record


def _compact(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":"), allow_nan=False).encode()


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
