"""Training that fails: how a site paces its tries, and when the coordinator gives the run up."""

import asyncio
from collections.abc import Awaitable, Callable

from fednats.errors import FednatsError, HospitalError
from fednats.protocol.events import Event, EverySiteFails
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.worker import WorkerDiedError

RETRY_S = 30.0
"""Pause after a job failed, unless a newer version comes first."""

LONGEST_RETRY_S = 600.0
"""Between tries of training that fails again and again: each costs a pass, and what makes it fail may be mended meanwhile."""

LOOK_S = 1.0


class Failures:
    """How a site's training fails, until it succeeds."""

    def __init__(self) -> None:
        self.why = ""
        """In words without data; empty while it does not fail."""
        self._n = 0

    def note(self, error: FednatsError) -> bool:
        """Take in that a pass failed; return whether it did so before. What is no fault of task or data does not count."""
        if not isinstance(error, HospitalError | WorkerDiedError):
            return False
        why = error.public if isinstance(error, HospitalError) else "the worker process ended in training"
        self._n = self._n + 1 if why == self.why else 1
        self.why = why
        return self._n > 1

    @property
    def pause_s(self) -> float:
        """Until the next try: twice as long after every failure of the same kind."""
        return float(min(RETRY_S * 2 ** max(self._n - 1, 0), LONGEST_RETRY_S))

    def clear(self) -> None:
        """Take in that a pass succeeded."""
        self.why, self._n = "", 0


def all_fail(daemon: Daemon) -> str:
    """Return how the training of every site below fails; empty if one does not, fails otherwise, or is not known."""
    presence = daemon.presence
    ways = set(presence.failing.values())
    return ways.pop() if len(ways) == 1 and len(presence.failing) == presence.n_sites else ""


async def give_up_when_all_fail(
    daemon: Daemon,
    progress: Callable[[], object],
    after_s: Callable[[], float],
    feed: Callable[[Event], Awaitable[None]],
) -> None:
    """Feed `EverySiteFails` when every site has failed in the same way for ``after_s`` without any ``progress``; for ever.

    ``progress`` is None while no run is open.
    """
    loop = asyncio.get_running_loop()
    before, since_s = ("", progress()), loop.time()
    while True:
        await asyncio.sleep(min(LOOK_S, after_s()))
        now = (all_fail(daemon), progress())
        if now != before or not now[0] or now[1] is None:
            before, since_s = now, loop.time()
        elif loop.time() - since_s >= after_s():
            daemon.log.error("every_site_fails", why=now[0], after_s=after_s())
            await feed(EverySiteFails(why=now[0]))
            since_s = loop.time()
