"""Wait for the daemons of a running federation to report a state."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from fednats.config import CoordinatorSettings
from fednats.messages import Aggregate
from fednats.storage.checkpoints import checkpoints_folder, newest_checkpoint
from fednats.subjects import HUB
from fednats.testbed.launch import COORDINATOR, Running
from fednats.verify.books import Book, Fate

Statuses = Mapping[str, Mapping[str, Any]]

ENDLESS = {"max_versions": 100_000}
"""Stop settings of a run that a test ends itself, with `end_after`."""

LIMIT_S = 120.0
_POLL_S = 0.1


async def until(running: Running, holds: Callable[[Statuses], bool], limit_s: float = LIMIT_S) -> Statuses:
    """Return the first statuses for which ``holds`` is true; fail after ``limit_s``, or when a daemon dies."""
    statuses: dict[str, Mapping[str, Any]] = {}
    try:
        async with asyncio.timeout(limit_s):
            while True:
                running.daemons.check()
                statuses |= await running.daemons.statuses()
                if holds(statuses):
                    return statuses
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise AssertionError(f"did not happen within {limit_s} s: {statuses}") from None


def closed(statuses: Statuses) -> bool:
    """Return whether the coordinator has closed the run."""
    return statuses.get("coordinator", {}).get("state") == "closed"


def closed_at(*names: str) -> Callable[[Statuses], bool]:
    """Return a check that these daemons know that the run is closed."""
    return lambda statuses: all(statuses.get(name, {}).get("state") == "closed" for name in names)


def reached(version: int) -> Callable[[Statuses], bool]:
    """Return a check that the coordinator is at ``version`` or later."""
    return lambda statuses: int(statuses.get("coordinator", {}).get("version", -1)) >= version


async def end_after(running: Running, n_versions: int) -> Statuses:
    """End the run ``n_versions`` from now, as its operator would: change the coordinator's settings and restart it."""
    daemon = running.daemons[COORDINATOR]
    await daemon.stop()
    settings = daemon.settings
    assert isinstance(settings, CoordinatorSettings)
    newest = newest_checkpoint(checkpoints_folder(settings.state_dir))
    assert newest is not None
    stop = settings.settings.stop.model_copy(update={"max_versions": newest.version + n_versions})
    daemon.settings = settings.model_copy(update={"settings": settings.settings.model_copy(update={"stop": stop})})
    await daemon.start()
    return await until(running, closed)


def version_now(federation_running: Running) -> int:
    """Return the newest version, whether or not the coordinator is running."""
    newest = newest_checkpoint(checkpoints_folder(federation_running.output / COORDINATOR))
    assert newest is not None
    return newest.version


async def takes_part(federation_running: Running, region: str) -> None:
    """Wait until the model has a sum that ``region`` makes from now on, on a version made from now on."""
    version = seen = version_now(federation_running)

    def is_in() -> bool:
        book = Book(HUB, federation_running.output / COORDINATOR / "journal.sqlite")
        return any(
            isinstance(taken.head, Aggregate) and taken.head.region == region and taken.head.model_version >= version
            for taken in book.taken.values()
            if taken.fate is Fate.SUMMED
        )

    try:
        async with asyncio.timeout(LIMIT_S):
            while not await asyncio.to_thread(is_in):  # each version brings new sums into the model
                seen = int((await until(federation_running, reached(seen + 1)))["coordinator"]["version"])
    except TimeoutError:
        statuses = await federation_running.daemons.statuses()
        raise AssertionError(f"{region} is not in the model {LIMIT_S} s later: {statuses}") from None
