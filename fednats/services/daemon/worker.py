"""One long-lived process beside a daemon, for training and cryptography, so that they never block the event loop.

The process is spawned, not forked, and owns what is heavy: torch, TenSEAL, the data. It ends with its daemon, even if
the daemon is killed. A worker that dies (hostile ciphertext, out of memory) is replaced. Only its current job fails,
because a job reaches the process only when the one before is done.
"""

import asyncio
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any, Generic, TypeVar

from fednats.errors import FednatsError
from fednats.services.daemon.retry import RETRY_S

JobsT = TypeVar("JobsT")

NICENESS = 10
"""Added to a worker's niceness, so that training does not slow down the daemons or the hospital's own work."""

OF_THE_DAEMON = (signal.SIGINT, signal.SIGTERM)
"""Signals that a worker ignores. They reach the whole process group; the daemon handles them and ends its worker."""

START_METHOD = "spawn"
"""Start method of multiprocessing. A testbed's daemon, itself a fork, sets ``forkserver``."""

_made: list[Any] = []
_make: list[Callable[[], Any]] = []


class WorkerDiedError(FednatsError):
    """The worker process ended during a job. A new one is started for the next job."""


class Worker(Generic[JobsT]):
    """Runs methods of one object, which ``make(*args)`` makes in the worker process.

    ``make`` is a module-level function. It does heavy imports in its body, so the daemon stays light.
    """

    def __init__(self, make: Callable[..., JobsT], *args: object) -> None:
        self._make = make
        self._args = args
        self._pool = self._start()
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> "Worker[JobsT]":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        processes = list((self._pool._processes or {}).values())  # noqa: SLF001 - the pool offers no terminate before 3.14
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.kill()  # the worker ignores SIGTERM
        for process in processes:
            await asyncio.to_thread(process.join)

    async def call(self, method: str, *args: object) -> Any:
        """Run ``method`` of the object; return its result or raise its error.

        Raises:
            WorkerDiedError: the process ended.
        """
        async with self._turn:
            try:
                with _signals_held():  # the first job starts the process
                    job = asyncio.get_running_loop().run_in_executor(self._pool, _run, method, args)
                return await job
            except BrokenProcessPool:
                self._pool.shutdown(wait=False)
                self._pool = self._start()
                raise WorkerDiedError(
                    f"the worker process ended in {method!r}; see the system's log for a signal or memory"
                ) from None

    async def persist(self, log: Any, method: str, *args: object) -> Any:
        """Run ``method`` as `call` does, and again whenever the process ends during it.

        For results without which the daemon cannot go on.
        """
        while True:
            try:
                return await self.call(method, *args)
            except WorkerDiedError as error:
                log.warning("worker_died", error=str(error), retry_s=RETRY_S)
                await asyncio.sleep(RETRY_S)

    def _start(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context(START_METHOD)
        return ProcessPoolExecutor(1, mp_context=context, initializer=_initialise, initargs=(self._make, self._args))


@contextmanager
def _signals_held() -> Iterator[None]:
    """Block the signals in `OF_THE_DAEMON`: a process started meanwhile inherits the block until it ignores them."""
    resource_tracker.ensure_running()  # otherwise multiprocessing starts it below, and unblocks the signals
    held = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_DAEMON)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _initialise(make: Callable[..., Any], args: tuple[object, ...]) -> None:
    for number in OF_THE_DAEMON:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_DAEMON)
    os.nice(NICENESS)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _make.append(lambda: make(*args))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _run(method: str, args: tuple[object, ...]) -> Any:
    if not _made:  # the first job makes the object, so that errors reach the caller
        _made.append(_make[0]())
    return getattr(_made[0], method)(*args)
