"""Reread ``sites`` and ``n_samples`` from an aggregator's settings file whenever the file changes."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from pathlib import Path
from typing import Any

from fednats.config import AggregatorSettings, load
from fednats.errors import ConfigError

REREAD_S = 1.0


FOLLOWED = ("sites", "n_samples")


async def changed_settings(log: Any, path: Path, held: AggregatorSettings) -> AsyncGenerator[AggregatorSettings, None]:
    """Yield the settings in ``path`` whenever its sites or their registered numbers of training cases change; forever.

    Other changes are logged, and hold from the next start on. A file that cannot be read changes nothing.
    """
    stamp: tuple[int, int, int] | None = None  # the file may have changed since the daemon read it
    while True:
        await asyncio.sleep(REREAD_S)
        before, stamp = stamp, _stamp(path)
        if stamp == before:
            continue
        try:
            now = await asyncio.to_thread(load, path, AggregatorSettings)
        except ConfigError as error:
            log.warning("settings_unreadable", error=str(error), holds="what the file said before")
            continue
        if others := sorted(key for key, value in now if value != getattr(held, key) and key not in FOLLOWED):
            log.warning("settings_changed", settings=others, hold="from the next start on")
        if (set(now.sites), now.n_samples) != (set(held.sites), held.n_samples):
            yield now
        held = now


async def renewed(changed: asyncio.Event, make: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run the coroutine that ``make`` returns; cancel it and make a new one each time ``changed`` is set; forever."""
    while True:
        running = asyncio.create_task(make())
        waiting = asyncio.create_task(changed.wait())
        try:
            await asyncio.wait({running, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            changed.clear()
        finally:
            for task in (running, waiting):
                task.cancel()
            await asyncio.gather(running, waiting, return_exceptions=True)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
