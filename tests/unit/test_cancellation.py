"""Calls that lose a cancellation, as those of nats-py do, and loops around them: they end all the same."""

import asyncio

import pytest

from fednats.transport.cancellation import cancellable, end, within


async def losing(n_lost: int) -> str:
    """Go on after ``n_lost`` cancellations, as nats-py does that waits for a full buffer."""
    for _ in range(n_lost):
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            continue
    return "sent"


async def begun(task: asyncio.Task[object]) -> asyncio.Task[object]:
    await asyncio.sleep(0)
    return task


async def test_tasks_end_however_often_they_lose_a_cancellation() -> None:
    async def loop() -> None:
        await losing(2)
        await asyncio.sleep(3600)

    async def failing() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            raise OSError("what is dropped")

    tasks = [await begun(asyncio.create_task(loop())), await begun(asyncio.create_task(failing()))]
    async with asyncio.timeout(10):
        await end(*tasks)
    assert all(task.done() for task in tasks)


async def test_a_call_that_lasts_too_long_has_ended_when_that_is_said() -> None:
    ended = asyncio.Event()

    async def call() -> None:
        try:
            await losing(1)
            await asyncio.sleep(3600)
        finally:
            ended.set()

    async with asyncio.timeout(10):
        with pytest.raises(TimeoutError):
            await within(0.01, call())
    assert ended.is_set()


async def test_what_a_call_returns_or_raises_comes_through() -> None:
    async def failing() -> None:
        raise OSError("refused")

    assert await within(10, losing(0)) == await cancellable(losing(0)) == "sent"
    with pytest.raises(OSError, match="refused"):
        await within(10, failing())
    with pytest.raises(OSError, match="refused"):
        await cancellable(failing())


async def test_a_loop_around_a_call_that_loses_cancellations_ends_with_the_first_one() -> None:
    async def loop() -> None:
        while True:
            await cancellable(losing(1))

    task = await begun(asyncio.create_task(loop()))
    task.cancel()
    async with asyncio.timeout(10):
        await asyncio.wait({task})
    assert task.cancelled()


async def test_a_cancellation_that_comes_with_the_result_is_not_lost() -> None:
    """wait_for of Python 3.11 returns the result; a ping whose answer comes while its connection is closed is such a call."""
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = await begun(asyncio.create_task(cancellable(asyncio.wait_for(answer, 10))))
    answer.set_result("pong")
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled()
