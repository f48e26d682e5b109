"""The region's newest receipt, kept beside a hospital's egress ledger: it countersigns where the ledger ends.

A hash chain does not show where it should end. Each update names the newest record of its site's ledger, and the region
repeats that name in its signed receipt. If the ledger lacks that record, its end is missing.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from fednats import subjects, wire
from fednats.crypto.signing import unsigned
from fednats.errors import ConfigError, LocalStorageError, RefusedError
from fednats.messages import NO_RECORD, Receipt

_MOST_BYTES = 2**20


@dataclass(frozen=True)
class Anchor:
    """A receipt, and the signed bytes it came as."""

    receipt: Receipt
    signed: bytes

    @property
    def subject(self) -> str:
        """Subject on which the receipt was published; its signature is bound to it."""
        return subjects.receipt(self.receipt.run, self.receipt.region, self.receipt.site)

    @property
    def head(self) -> str:
        """Newest record of the site's ledger that an update named to the region."""
        read = [verdict for verdict in self.receipt.verdicts if verdict.sequence]
        return max(read, key=lambda verdict: verdict.sequence).ledger_head if read else NO_RECORD


def anchor_file(ledger: Path) -> Path:
    """Return the receipt's file: ``egress-ledger.receipt`` beside ``egress-ledger.jsonl``."""
    return ledger.with_suffix(".receipt")


def keep_anchor(ledger: Path, signed: bytes) -> None:
    """Store a receipt beside ``ledger``, in place of the previous one.

    Raises:
        LocalStorageError: the disk is full or broken; the previous receipt is still there.
    """
    file = anchor_file(ledger)
    new = file.with_suffix(".new")
    try:
        with new.open("wb") as opened:
            opened.write(signed)
            opened.flush()
            os.fsync(opened.fileno())
        new.replace(file)
    except OSError as error:
        raise LocalStorageError(f"{file}: {error}; the region's receipt is not kept, make room on its disk") from error


def read_anchor(ledger: Path) -> Anchor | None:
    """Read the receipt beside ``ledger`` without verifying its signature; None if there is none.

    Raises:
        ConfigError: it cannot be read, or is not a receipt.
    """
    file = anchor_file(ledger)
    try:
        with file.open("rb") as opened:
            signed = opened.read(_MOST_BYTES)
        return Anchor(wire.unpack(unsigned(signed), Receipt), signed)
    except FileNotFoundError:
        return None
    except (OSError, RefusedError) as error:
        raise ConfigError(
            f"{file}: is no receipt of a region ({error}); keep it elsewhere and a new one is begun"
        ) from error


def missing_heads(ledger: Path, newest: str) -> list[str]:
    """Return records that were named as the newest of ``ledger`` but that it does not mention.

    One is named by the receipt beside the ledger, the other, ``newest``, by the site's newest update.

    Raises:
        ConfigError: the receipt cannot be read.
        LocalStorageError: the ledger cannot be read.
    """
    anchor = read_anchor(ledger)
    named = {newest, NO_RECORD if anchor is None else anchor.head} - {NO_RECORD}
    try:
        with ledger.open("rb") as lines:
            for line in lines:
                if not named:
                    break
                named = {head for head in named if head.encode() not in line}
    except FileNotFoundError:
        pass
    except OSError as error:
        raise LocalStorageError(
            f"{ledger}: cannot be read ({error}); what left cannot be told, so nothing leaves"
        ) from error
    return sorted(named)
