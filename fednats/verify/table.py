"""The ledger as a table for people."""

from rich.table import Table

from fednats.verify.books import Fate
from fednats.verify.joined import LOST, SENT, UNDER_WAY, Books

_FIRST = (SENT, UNDER_WAY, LOST, Fate.WAITING.value, Fate.SUMMED.value, Fate.LEFT_OVER.value)


def table(ledger: Books) -> Table:
    """Return a table of the fates of updates at their regions and of sums at the node above."""
    drawn = Table(title="ledger")
    drawn.add_column("")
    drawn.add_column("updates", justify="right")
    drawn.add_column("sums", justify="right")
    refused = sorted({*ledger.updates, *ledger.sums} - set(_FIRST))
    for name in (*_FIRST, *refused):
        drawn.add_row(name, str(ledger.updates[name]), str(ledger.sums[name]))
    return drawn
