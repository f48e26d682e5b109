"""The window on simulated links: a transmitter with a queue before it, and a delay behind it."""

import asyncio
import heapq
from dataclasses import dataclass, field

import pytest

from fednats.transport.flow import Flow
from fednats.transport.window import FIRST_BYTES, MOST_BYTES, Window

CHUNK = 2**18
ROUND_TRIP_S = 0.3


@dataclass
class Link:
    """Carries chunks at ``mbit``; the answer comes a round trip after the last bit was sent."""

    mbit: float
    round_trip_s: float = ROUND_TRIP_S
    now: float = 0.0
    free_at: float = 0.0
    longest_queue_s: float = 0.0
    most_under_way: int = 0
    answers: list[float] = field(default_factory=list)

    def carry(self, n_bytes: int, window: Window) -> float:
        """Send so much through the window; return the share of the link's rate that was used."""
        started, left, answered = self.now, n_bytes, 0
        under_way: list[tuple[float, int, float, int]] = []
        while answered < n_bytes:
            while left and window.fits(size := min(CHUNK, left)):
                window.sent(size)
                left -= size
                self.free_at = max(self.free_at, self.now) + size * 8 / self.mbit / 1e6
                heapq.heappush(under_way, (self.free_at + self.round_trip_s, left, self.now, size))
                self.longest_queue_s = max(self.longest_queue_s, self.free_at - self.now)
                self.most_under_way = max(self.most_under_way, window.under_way_bytes)
            self.now, _, sent_at, size = heapq.heappop(under_way)
            self.answers.append(self.now - sent_at)
            assert self.answers[-1] < window.timeout_s
            window.answered(size, self.answers[-1], self.now)
            answered += size
        return n_bytes * 8 / self.mbit / 1e6 / (self.now - started)


@pytest.mark.parametrize("mbit", [2, 8, 20, 50, 100, 200, 400])
@pytest.mark.parametrize("round_trip_s", [0.001, 0.03, 0.3])
def test_a_link_is_filled_and_no_more_under_way_than_it_takes(mbit: float, round_trip_s: float) -> None:
    link, window = Link(mbit, round_trip_s), Window()
    assert link.carry(int(30 * mbit * 1e6 / 8), window) >= 0.85
    assert link.most_under_way <= MOST_BYTES
    assert link.longest_queue_s < 6
    settled = link.answers[len(link.answers) // 2 :]
    assert max(settled) < 2 * round_trip_s + 4 * CHUNK * 8 / mbit / 1e6 + 0.3


@pytest.mark.parametrize("mbit", [0.5, 1])
def test_on_a_very_slow_link_chunks_go_one_by_one_and_pings_are_answered_in_time(mbit: float) -> None:
    link, window = Link(mbit), Window()
    assert link.carry(20 * CHUNK, window) >= 0.8
    assert link.longest_queue_s <= FIRST_BYTES * 8 / mbit / 1e6
    assert max(link.answers[-5:]) < 1.1 * (CHUNK * 8 / mbit / 1e6 + ROUND_TRIP_S)


def test_it_follows_a_link_that_becomes_slower_farther_and_faster() -> None:
    window = Window()
    link = Link(100, 0.02)
    link.carry(50_000_000, window)
    link.round_trip_s = 0.3
    link.carry(150_000_000, window)  # finds out that the base is another
    assert link.carry(100_000_000, window) >= 0.8
    link.mbit = 5
    link.carry(20_000_000, window)
    assert link.carry(10_000_000, window) >= 0.8
    assert max(link.answers[-20:]) < 3
    link.mbit = 200
    link.carry(300_000_000, window)
    assert link.carry(100_000_000, window) >= 0.8


def test_who_sends_less_than_the_window_takes_does_not_widen_it() -> None:
    link, window = Link(100), Window()
    for _ in range(50):
        link.carry(CHUNK, window)
    assert window.size_bytes == FIRST_BYTES


async def test_chunks_go_in_the_order_of_asking_and_one_that_is_given_up_leaves_no_trace() -> None:
    flow, going = Flow(), asyncio.Event()
    started: list[int] = []

    def carried(number: int) -> asyncio.Task[int]:
        async def ask(timeout_s: float) -> int:
            assert timeout_s >= 30
            started.append(number)
            await going.wait()
            return number

        return asyncio.create_task(flow.carry(FIRST_BYTES // 2, ask))

    calls = [carried(number) for number in range(6)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert started == [0, 1]
    calls[1].cancel()  # under way
    calls[3].cancel()  # waiting
    await asyncio.wait(calls[1:2])
    await asyncio.sleep(0)
    assert started == [0, 1, 2]
    going.set()
    assert await asyncio.gather(*(calls[number] for number in (0, 2, 4, 5))) == [0, 2, 4, 5]
    assert started == [0, 1, 2, 4, 5]
    assert flow.window.under_way_bytes == 0


async def test_what_was_under_way_when_the_connection_broke_does_not_count_in_the_new_one() -> None:
    flow, broken = Flow(), asyncio.Event()

    async def ask(_timeout_s: float) -> None:
        await broken.wait()
        raise ConnectionError

    async def answer(_timeout_s: float) -> str:
        return "stored"

    lost = asyncio.create_task(flow.carry(FIRST_BYTES, ask))
    waiting = asyncio.create_task(flow.carry(CHUNK, answer))
    await asyncio.sleep(0)
    flow.start_anew()
    assert await waiting == "stored"
    broken.set()
    with pytest.raises(ConnectionError):
        await lost
    assert flow.window.under_way_bytes == 0
