"""Restart an aggregator whose state is from a backup, without adding an update to a second sum.

Its journal lacks the sums that it has published since. An update in two sums would count twice, and two sums that
differ by one hospital would reveal that hospital's update to the node above. So when an aggregator starts, it compares
the newest sum in its stream with its journal, and reads what the journal lacks from its notes (`Compositions`).
"""

from collections.abc import Awaitable, Callable, Container
from typing import Any

from fednats.errors import RestoreError
from fednats.messages import Aggregate, Composition, EvaluationSum
from fednats.protocol.events import Restored
from fednats.services.tier.compositions import Compositions


async def missed(
    known: Container[str],
    sum_: Aggregate | None,
    evaluation: EvaluationSum | None,
    newest_version: Callable[[], Awaitable[int]],
    compositions: Compositions,
    log: Any,
) -> Restored | None:
    """Return what the journal lacks; None if it has everything that the region has published.

    Args:
        known: ids of the sums in the journal.
        sum_: the newest published sum; None if there is none, or the journal has it.
        evaluation: the newest published sum of evaluations; None likewise.
        newest_version: returns the newest model version in the region.
        compositions: the region's notes.
        log: the daemon's log.

    Raises:
        RestoreError: a note is missing.
    """
    if sum_ is None and evaluation is None:
        return None
    made: list[Composition] = []
    identity = "" if sum_ is None else sum_.aggregate_id
    while identity and identity not in known:
        note = await compositions.read(identity)
        if note is None:
            raise RestoreError(
                f"this region has published sum {identity}, which the journal here does not know, and the bus has no note of"
                " what is in it: a hospital's update could be in a second sum; restore a newer backup, or start the"
                " region's server on an empty store, which loses the updates that wait there"
            )
        made.append(note)
        identity = note.previous
    version = max(await newest_version(), 0 if evaluation is None else evaluation.version)
    log.warning("restored_from_older_state", sums_since=len(made), newest_version=version)
    return Restored(version=version, made=tuple(reversed(made)), blocks=await compositions.read_blocks())
