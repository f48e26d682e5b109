"""Restart processes that end under ``fednats run``, as a supervisor such as systemd does in the field."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fednats.errors import CONFIG_EXIT, BusError
from fednats.testbed.processes import DaemonDiedError

FIRST_PAUSE_S = 1.0
"""Pause before the first restart; it doubles with each further death in a row."""

MAX_DEATHS = 5
"""Most deaths in a row; one more ends the run."""

SOUND_S = 60.0
"""When a process has lived longer than this, its count of deaths starts again."""

_LOG_TAIL_LINES = 5


class Watched(Protocol):
    """A daemon or a server."""

    @property
    def label(self) -> str:
        """Name for people to read, also in the summary."""

    @property
    def log_file(self) -> Path:
        """Log that says why it ended."""

    @property
    def ended_with(self) -> int | None:
        """Exit code of a process that has ended by itself, negative for a signal; else None."""

    async def start(self) -> None:
        """Start it again."""


@dataclass
class _Life:
    started_s: float
    deaths: int = 0
    due_s: float | None = None
    """Time of the next start; None while the process runs."""


class Supervisor:
    """Restarts the processes of a federation; call `mend` regularly."""

    def __init__(self, watched: Iterable[Watched]) -> None:
        now_s = asyncio.get_running_loop().time()
        self._watched = list(watched)
        self._lives = {item.label: _Life(now_s) for item in self._watched}
        self.restarts: Counter[str] = Counter()
        """Number of restarts, by label."""

    async def mend(self) -> None:
        """Restart the processes that have ended and are due.

        Raises:
            DaemonDiedError: a process ended because of its settings, or more than `MAX_DEATHS` times in a row.
        """
        for item in self._watched:
            life = self._lives[item.label]
            now_s = asyncio.get_running_loop().time()
            if life.due_s is None and (code := item.ended_with) is not None:
                self._note_death(item, life, code, now_s)
            if life.due_s is not None and now_s >= life.due_s:
                await self._start(item, life)

    def _note_death(self, item: Watched, life: _Life, code: int, now_s: float) -> None:
        life.deaths = 1 if now_s - life.started_s > SOUND_S else life.deaths + 1
        if code == CONFIG_EXIT:
            raise DaemonDiedError(f"{item.label} ended by an error that starting it again does not mend; {_tail(item)}")
        if life.deaths > MAX_DEATHS:
            raise DaemonDiedError(
                f"{item.label} ended {life.deaths} times in a row, each time within {SOUND_S:.0f} s of its start, the last"
                f" time with exit code {code}; {_tail(item)}"
            )
        life.due_s = now_s + FIRST_PAUSE_S * 2 ** (life.deaths - 1)

    async def _start(self, item: Watched, life: _Life) -> None:
        loop = asyncio.get_running_loop()
        life.due_s, life.started_s = None, loop.time()
        self.restarts[item.label] += 1
        try:
            await item.start()
        except BusError:  # a server that does not come up
            self._note_death(item, life, 1, loop.time())


def _tail(item: Watched) -> str:
    try:
        lines = item.log_file.read_text(encoding="utf-8", errors="replace").splitlines()[-_LOG_TAIL_LINES:]
    except OSError:
        lines = []
    return f"{item.log_file} ends with:\n" + "\n".join(lines)
