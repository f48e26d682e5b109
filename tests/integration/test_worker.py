"""The worker process beside a daemon."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import structlog

from fednats.config import AggregationSettings, DeltaSettings
from fednats.errors import ConfigError, Reason, RefusedError
from fednats.messages import Aggregate, Update
from fednats.protocol.events import Combination, Part
from fednats.services.aggregator.adder import Adder, PartRefusedError
from fednats.services.daemon.answers import Fit
from fednats.services.daemon.worker import OF_THE_DAEMON, Worker, WorkerDiedError
from tests.makers import update

KILLING = b"killing"


class Jobs:
    def __init__(self, start: int) -> None:
        if start < 0:
            raise ConfigError("start: below zero")
        self.count = start

    def add(self, n: int) -> int:
        self.count += n
        return self.count

    def pid(self) -> int:
        return os.getpid()

    def niceness(self) -> int:
        return os.nice(0)

    def refuse(self) -> None:
        raise RefusedError(Reason.CIPHERTEXT, "damaged")

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def die_once(self, mark: Path) -> str:
        if not mark.exists():
            mark.touch()
            self.die()
        return "answer"

    def weighted_sum(self, _fit: Fit, _position: int, chunks: list[bytes], *_how: object) -> bytes:
        if KILLING in chunks:
            self.die()
        return b"".join(chunks)


def make_jobs(start: int) -> Jobs:
    return Jobs(start)


async def test_state_stays_between_calls_in_another_process() -> None:
    async with Worker(make_jobs, 5) as worker:
        assert await worker.call("add", 2) == 7
        assert await worker.call("add", 2) == 9
        assert await worker.call("pid") != os.getpid()


async def test_a_worker_stands_back_for_its_daemon() -> None:
    async with Worker(make_jobs, 5) as worker:
        assert await worker.call("niceness") == min(19, os.nice(0) + 10)


async def test_a_worker_leaves_signals_to_its_daemon() -> None:
    """A supervisor's SIGTERM and Ctrl-C reach the whole process group, even a worker that is starting."""
    before = {number: signal.signal(number, lambda *_: None) for number in OF_THE_DAEMON}  # this process is the daemon
    try:
        async with Worker(make_jobs, 5) as worker:
            first = asyncio.ensure_future(worker.call("pid"))
            await asyncio.sleep(0)
            (starting,) = worker._pool._processes
            for number in OF_THE_DAEMON:
                os.kill(starting, number)
            assert await first == starting
            for number in OF_THE_DAEMON:
                os.kill(starting, number)
            assert await worker.call("add", 1) == 6
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert not _alive(starting)


async def test_errors_keep_their_fields_on_the_way_back() -> None:
    async with Worker(make_jobs, 0) as worker:
        with pytest.raises(RefusedError) as raised:
            await worker.call("refuse")
    assert (raised.value.reason, raised.value.detail) == (Reason.CIPHERTEXT, "damaged")


async def test_what_cannot_be_made_says_why() -> None:
    async with Worker(make_jobs, -1) as worker:
        with pytest.raises(ConfigError, match="below zero"):
            await worker.call("pid")


async def test_a_worker_that_crashes_is_replaced() -> None:
    async with Worker(make_jobs, 5) as worker:
        first = await worker.call("pid")
        with pytest.raises(WorkerDiedError):
            await worker.call("die")
        assert await worker.call("pid") != first
        assert await worker.call("add", 1) == 6


async def test_what_waits_for_its_turn_outlives_the_job_that_ends_the_process() -> None:
    async with Worker(make_jobs, 5) as worker:
        jobs = [worker.call("die"), worker.call("add", 1), worker.call("die"), worker.call("add", 1)]
        became = await asyncio.gather(*jobs, return_exceptions=True)
    assert [WorkerDiedError if isinstance(each, WorkerDiedError) else each for each in became] == [
        WorkerDiedError,
        6,
        WorkerDiedError,
        6,
    ]


async def test_what_must_be_known_is_asked_again_after_a_death(tmp_path: Path) -> None:
    async with Worker(make_jobs, 5) as worker:
        with structlog.testing.capture_logs() as lines:
            assert await worker.persist(structlog.get_logger(), "die_once", tmp_path / "mark") == "answer"
    assert [line["event"] for line in lines] == ["worker_died"]


@asynccontextmanager
async def dying(worker: Worker[Jobs]) -> AsyncIterator[None]:
    """Have another task's jobs kill the worker again and again."""

    async def die() -> None:
        while True:
            with suppress(WorkerDiedError):
                await worker.call("die")

    task = asyncio.create_task(die())
    await asyncio.sleep(0)  # lets the other task ask first
    try:
        yield
    finally:
        task.cancel()


async def summed(worker: Worker[Any], **sent: bytes) -> bytes:
    """Return a region's sum of the updates ``sent``, by site."""

    async def read(head: Update | Aggregate) -> AsyncGenerator[bytes, None]:
        assert isinstance(head, Update)
        yield sent[head.site]

    parts = tuple(Part(update(site), mass=1.0, staleness=0) for site in sent)
    combination = Combination("c", 0, parts, scale=1.0, n_sites=len(parts))
    fit = Fit(DeltaSettings(), AggregationSettings(), 1, "k", 1, 500, 500)
    adder = Adder(worker, fit, combination, (1,) * len(parts), read)
    return b"".join([chunk async for chunk in adder.chunks()])


async def test_honest_updates_are_summed_while_something_else_ends_the_process() -> None:
    async with Worker(make_jobs, 5) as worker, dying(worker):
        assert await summed(worker, a=b"honest", b=b"too") == b"honesttoo"


async def test_of_a_sum_only_the_update_that_ends_the_process_is_refused() -> None:
    async with Worker(make_jobs, 5) as worker, dying(worker):
        with pytest.raises(PartRefusedError) as refused:
            await summed(worker, a=b"honest", b=KILLING, c=b"too")
    assert (refused.value.part_id, refused.value.reason) == ("b-1", Reason.CIPHERTEXT)


async def test_the_event_loop_runs_on_while_the_worker_works() -> None:
    async with Worker(make_jobs, 0) as worker:
        job = asyncio.ensure_future(worker.call("pid"))
        turns = 0
        while not job.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns > 100


PARENT = """
import asyncio, os
from tests.integration.test_worker import make_jobs
from fednats.services.daemon.worker import Worker

async def main():
    async with Worker(make_jobs, 0) as worker:
        print(await worker.call("pid"), flush=True)
        os.kill(os.getpid(), 9)

if __name__ == "__main__":
    asyncio.run(main())
"""


async def test_a_worker_ends_with_a_killed_daemon(tmp_path: object) -> None:
    file = f"{tmp_path}/parent.py"
    with open(file, "w", encoding="utf-8") as script:  # noqa: ASYNC230, PTH123
        script.write(PARENT)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        file,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.getcwd()},  # noqa: PTH109
    )
    output, _ = await process.communicate()
    pid = int(output)
    async with asyncio.timeout(10):
        while _alive(pid):  # noqa: ASYNC110 - another process's end has no event
            await asyncio.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as stat:  # noqa: PTH123
            return stat.read().rsplit(") ", 1)[1][0] != "Z"
    except FileNotFoundError:
        return False
