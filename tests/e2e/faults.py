"""Helpers for tests of faults: a task of any size, and readers of daemons' files."""

import asyncio
import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fednats.protocol.events import Event
from fednats.storage.database import open_read_only
from fednats.storage.journal import read_journal
from fednats.testbed.launch import Running
from tests.e2e.conftest import OWN_TASK
from tests.e2e.until import LIMIT_S, Statuses

T = TypeVar("T")

PARAMETERS_PER_UNIT = 33
_POLL_S = 0.01

_TASK = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("own_task", {str(OWN_TASK)!r})
own_task = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own_task)
from torch import nn

class Wide(own_task.MyTask):
    def __init__(self, csv="", n_units=16):
        super().__init__(csv)
        self.n_units = n_units

    def model(self):
        return nn.Sequential(nn.Linear(30, self.n_units), nn.ReLU(), nn.Linear(self.n_units, 2))
"""


def wide(folder: Path, n_parameters: int) -> dict[str, Any]:
    """Return settings for a federation whose model has about ``n_parameters``."""
    (folder / "wide.py").write_text(_TASK)
    return {"task": f"{folder / 'wide.py'}:Wide", "options": {"n_units": n_parameters // PARAMETERS_PER_UNIT}}


def in_state(name: str, state: str) -> Callable[[Statuses], bool]:
    """Return a check that the daemon ``name`` reports ``state``."""
    return lambda statuses: statuses.get(name, {}).get("state") == state


async def found(running: Running, look: Callable[[], T | None]) -> T:
    """Return the first result of ``look`` that is not None; fail if a daemon dies meanwhile."""
    try:
        async with asyncio.timeout(LIMIT_S):
            while True:
                running.daemons.check()
                if (something := look()) is not None:
                    return something
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise AssertionError(f"nothing found within {LIMIT_S} s") from None


def outbox(running: Running, site: str, query: str) -> list[tuple[Any, ...]]:
    """Query the outbox of a site, which may be running, or about to create it."""
    file = running.output / f"site-{site}" / "outbox.sqlite"
    if not file.exists():
        return []
    connection = open_read_only(file)
    try:
        return connection.execute(query).fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return []
        raise
    finally:
        connection.close()


def events(running: Running, daemon: str) -> list[Event]:
    """Return the events in the journal of an aggregator or the coordinator."""
    file = running.output / daemon / "journal.sqlite"
    return [entry.event for entry in read_journal(file)] if file.exists() else []


def outbox_of(statuses: Statuses, site: str) -> dict[str, int]:
    """Return how many updates of a site wait, were sent and were dropped."""
    counts: dict[str, int] = statuses.get(f"site-{site}", {}).get("outbox", {})
    return counts


def logged(running: Running, daemon: str, event: str) -> list[dict[str, Any]]:
    """Return a daemon's log entries of the event ``event``."""
    text = running.daemons[daemon].log_file.read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if f'"event": "{event}"' in line)
    return [json.loads(line) for line in lines]
