"""The newest receipt of a hospital's region, kept beside the egress ledger: the region countersigns where the ledger ends.

A chain does not say where it should end. Each update names the newest record of its site's ledger, and the region repeats
that name in its receipt, under its own signature: a ledger without that record has lost its end.
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
    """A receipt as it came."""

    receipt: Receipt
    signed: bytes

    @property
    def subject(self) -> str:
        """Where it was published, which its signature is bound to."""
        return subjects.receipt(self.receipt.run, self.receipt.region, self.receipt.site)

    @property
    def head(self) -> str:
        """The newest record of the site's ledger that the region has seen named."""
        read = [verdict for verdict in self.receipt.verdicts if verdict.sequence]
        return max(read, key=lambda verdict: verdict.sequence).ledger_head if read else NO_RECORD


def anchor_file(ledger: Path) -> Path:
    """Return where the receipt is kept: ``egress-ledger.receipt`` beside ``egress-ledger.jsonl``."""
    return ledger.with_suffix(".receipt")


def keep_anchor(ledger: Path, signed: bytes) -> None:
    """Keep a receipt beside ``ledger``, in place of the one before.

    Raises:
        LocalStorageError: the disk does not take it; the one before is still there.
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
    """Return the receipt beside ``ledger``, its signature unverified; None if there is none.

    Raises:
        ConfigError: it cannot be read.
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
    """Return the records that were named as the newest of ``ledger`` and are not mentioned there.

    The receipt beside it names one, and the site's newest update another, ``newest``.

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
