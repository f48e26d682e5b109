"""Wait for what the daemons of a running federation say of themselves."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from fednats.testbed.launch import Running

Statuses = Mapping[str, Mapping[str, Any]]

LIMIT_S = 120.0
_POLL_S = 0.1


async def until(running: Running, holds: Callable[[Statuses], bool], limit_s: float = LIMIT_S) -> Statuses:
    """Return the first statuses for which ``holds``; fail after ``limit_s`` or when a daemon has died."""
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
    """Whether the coordinator has closed the run."""
    return statuses.get("coordinator", {}).get("state") == "closed"


def reached(version: int) -> Callable[[Statuses], bool]:
    """Whether the coordinator is at ``version`` or beyond."""
    return lambda statuses: int(statuses.get("coordinator", {}).get("version", -1)) >= version
