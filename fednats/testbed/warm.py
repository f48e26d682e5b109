"""Fork daemons from one parent that has loaded their modules, so that a testbed is up in seconds.

In the field each daemon is an interpreter of its own, which loads for about three seconds with its worker. Here a fork
runs the same command line in its own session, and forks its worker from its own state at the start.
"""

import asyncio
import atexit
import multiprocessing
import multiprocessing.connection
import os
import runpy
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fednats.services.daemon import worker

_ROLES = ("site", "aggregator", "coordinator")
PRELOADED = (
    "fednats.cli",
    *(f"fednats.services.{role}.service" for role in _ROLES),
    *(f"fednats.services.{role}.worker" for role in _ROLES),
    "fednats.learning.tasks.breast_cancer",
    "torch._dynamo",  # the first optimiser loads it
)

_PARENT = multiprocessing.get_context("forkserver")
_PARENT.set_forkserver_preload(list(PRELOADED))


class ForkedProcess:
    """A process that `fork` started; it has the methods of `asyncio.subprocess.Process` that the testbed uses."""

    def __init__(self, process: BaseProcess) -> None:
        self._process = process
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(process.sentinel, self._reap)

    @property
    def pid(self) -> int:
        """Process id; it is also the id of the process group."""
        return int(self._process.pid or 0)

    @property
    def returncode(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._ended.result() if self._ended.done() else None

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal if the process runs."""
        if not self._ended.done():
            os.kill(self.pid, number)

    async def wait(self) -> int:
        """Wait until the process ends; return the exit code."""
        return await asyncio.shield(self._ended)

    def _reap(self) -> None:
        self._loop.remove_reader(self._process.sentinel)
        self._process.join()
        self._ended.set_result(self._process.exitcode or 0)


async def fork(arguments: list[str], log: Path, environment: Mapping[str, str]) -> ForkedProcess:
    """Run ``fednats ARGUMENTS`` in a fork; append its output to ``log``, an absolute path."""
    process = _PARENT.Process(target=_main, args=(arguments, log, dict(environment)))
    await asyncio.to_thread(process.start)  # the first start waits until the parent has loaded everything
    return ForkedProcess(process)


def _main(arguments: list[str], log: Path, environment: Mapping[str, str]) -> None:
    os.setsid()
    with log.open("ab") as output:
        os.dup2(output.fileno(), sys.stdout.fileno())
        os.dup2(output.fileno(), sys.stderr.fileno())
    os.environ.clear()
    os.environ.update(environment)
    os.umask(0o077)  # as the daemon sets it before it starts its worker
    _fork_workers_from_here()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = ["fednats", *arguments]
    runpy.run_module("fednats", run_name="__main__")


def _fork_workers_from_here() -> None:
    """Fork the process that this daemon's workers will be forked from, while there is only one thread."""
    address = multiprocessing.connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
    alive, mine = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(mine)
                for number in worker.OF_THE_DAEMON:
                    signal.signal(number, signal.SIG_IGN)
                forkserver.main(listener.fileno(), alive, [])
            finally:
                os._exit(0)
    os.close(alive)
    server: Any = forkserver._forkserver  # noqa: SLF001 - it has no way to adopt a running server
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, mine, pid  # noqa: SLF001
    worker.START_METHOD = "forkserver"


@atexit.register
def _kill_forks() -> None:
    """Kill what still runs when this process ends; multiprocessing would wait for it."""
    for process in multiprocessing.active_children():
        process.kill()


def _end_with_parent() -> None:
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
