"""An aggregator whose state is from a backup: which sums it had published since, and of which updates.

Its journal does not know them, and an update that is in a sum must never be in another: it would count twice, and two
sums that differ by one hospital would tell the node above that hospital's update. So an aggregator compares, when it
starts, the newest sum in its stream with its journal, and reads in its notes (`Compositions`) what it misses.
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
    """Return what the journal misses; None if it has all that the region has published.

    Args:
        known: ids of the sums that the journal has.
        sum_: the newest that is published; None if there is none, or the journal has it.
        evaluation: the newest sum of evaluations that is published; likewise.
        newest_version: returns the newest model version in the region.
        compositions: the region's notes.
        log: of the daemon.

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
