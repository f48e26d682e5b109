"""A link that is slow, narrow, or cut, over real sockets."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from fednats.errors import ConfigError
from fednats.testbed.wan import Wan, WanSettings, parse_wan
from fednats.testbed.wan_direction import MAX_UNDER_WAY_BYTES, QUEUE_S

LIMIT_S = 20.0

Connected = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def link(text: str = "", handler: Handler = echo) -> AsyncIterator[Wan]:
    """Yield a link to its own server, which runs ``handler``."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, Wan(parse_wan(text) if text else WanSettings(), "127.0.0.1", port, name="test") as wan:
        async with asyncio.timeout(LIMIT_S):
            yield wan


@asynccontextmanager
async def connected(wan: Wan) -> AsyncIterator[Connected]:
    reader, writer = await asyncio.open_connection("127.0.0.1", wan.port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def ask(connection: Connected, data: bytes) -> bytes:
    reader, writer = connection
    writer.write(data)
    return await reader.readexactly(len(data))


async def gone(connection: Connected) -> bool:
    """Return whether the connection ends in a reset."""
    try:
        return await connection[0].read(1) == b"never" and False
    except ConnectionResetError:
        return True


async def silent(connection: Connected, data: bytes = b"hello") -> bool:
    """Return whether no answer comes within 0.3 s, which is long for a link without delay.

    A slow machine cannot make a test fail that expects silence.
    """
    reader, writer = connection
    writer.write(data)
    try:
        async with asyncio.timeout(0.3):
            await reader.read(1)
    except TimeoutError:
        return True
    return False


async def send(wan: Wan, n_bytes: int) -> None:
    """Send and close; return when the server has closed too."""
    async with connected(wan) as (reader, writer):
        writer.write(bytes(n_bytes))
        await writer.drain()
        writer.write_eof()
        assert await reader.read() == b""


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110 -- a link has no event to wait for
        await asyncio.sleep(0.002)


class Sink:
    """Counts what arrives, and when."""

    def __init__(self) -> None:
        self.n_bytes = 0
        self.first_s = self.last_s = 0.0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 20):
            self.last_s = time.monotonic()
            self.first_s = self.first_s or self.last_s
            self.n_bytes += len(data)
        writer.close()


async def test_a_plain_link_carries_both_ways_and_counts() -> None:
    async with link() as wan, connected(wan) as connection:
        data = bytes(range(256)) * 4000
        assert await ask(connection, data) == data
        assert (wan.bytes_up, wan.bytes_down) == (len(data), len(data))


async def test_the_delay_is_paid_each_way() -> None:
    async with link("delay_ms=60") as wan, connected(wan) as connection:
        assert await ask(connection, b"the connection is open now") != b""
        started = time.monotonic()
        assert await ask(connection, b"hello") == b"hello"
        assert time.monotonic() - started >= 2 * 0.060


async def test_opening_takes_the_delay_as_well() -> None:
    async with link("delay_ms=60") as wan:
        started = time.monotonic()
        async with connected(wan) as connection:
            await ask(connection, b"hello")
        assert time.monotonic() - started >= 3 * 0.060


async def test_jitter_varies_and_keeps_the_order() -> None:
    async with link("delay_ms=5,jitter_ms=40") as wan, connected(wan) as (reader, writer):
        expected = b""
        waits = []
        for number in range(60):
            piece = number.to_bytes(2, "big") * 50
            started = time.monotonic()
            writer.write(piece)
            expected += piece
            if number % 6 == 5:
                assert await reader.readexactly(len(expected)) == expected
                waits.append(time.monotonic() - started)
                expected = b""
        assert min(waits) >= 2 * 0.005
        assert len({round(wait, 3) for wait in waits}) > 1


@pytest.mark.parametrize("n_connections", [1, 2])
async def test_the_cap_is_shared_by_all_connections_of_a_direction(n_connections: int) -> None:
    sink = Sink()
    n_bytes, rate = 1_500_000, 16e6 / 8
    async with link("mbit=16", sink) as wan:
        await asyncio.gather(*(send(wan, n_bytes // n_connections) for _ in range(n_connections)))
    assert sink.n_bytes == n_bytes
    grain = rate * 0.01
    assert sink.last_s - sink.first_s >= 0.95 * (n_bytes - grain * n_connections) / rate
    assert sink.last_s - sink.first_s <= 3 * n_bytes / rate  # a loaded machine may pause for a while


async def test_each_direction_has_a_cap_of_its_own() -> None:
    n_bytes, rate = 1_000_000, 16e6 / 8
    taken_s: list[float] = []
    async with link("mbit=16") as wan, connected(wan) as connection:
        while not taken_s or (min(taken_s) > 1.8 * n_bytes / rate and len(taken_s) < 5):  # a busy machine may pause
            started = time.monotonic()
            await ask(connection, bytes(n_bytes))
            taken_s.append(time.monotonic() - started)
    assert 0.95 * n_bytes / rate <= min(taken_s) <= 1.8 * n_bytes / rate


async def test_two_connections_share_fairly() -> None:
    async with link("mbit=16", Sink()) as wan:
        big = asyncio.create_task(send(wan, 2_000_000))
        await until(lambda: wan.bytes_up > 0)
        await send(wan, 100_000)
        assert wan.bytes_up < 1_500_000
        await big


async def test_a_full_queue_holds_the_sender_back() -> None:
    async with link("mbit=8,delay_ms=100", Sink()) as wan, connected(wan) as (_, writer):
        started = time.monotonic()
        writer.write(bytes(12_000_000))
        worst = 0.0
        while time.monotonic() - started < 1.5:
            worst = max(worst, wan._up._idle_at - asyncio.get_running_loop().time())
            await asyncio.sleep(0.005)
        assert worst <= QUEUE_S + 0.011
        assert wan._up._under_way_bytes <= 1e6 * (0.1 + QUEUE_S + 0.1)
        assert wan.bytes_up <= 1e6 * (time.monotonic() - started)
        writer.transport.abort()


async def test_a_slow_reader_holds_the_sender_back_and_memory_stays_bounded() -> None:
    read = asyncio.Event()
    sink = Sink()

    async def waits(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read.wait()
        await sink(reader, writer)

    n_bytes = 64_000_000
    async with link("", waits) as wan, connected(wan) as (reader, writer):
        writer.write(bytes(n_bytes))
        writer.write_eof()
        crossed = -1
        while crossed != wan.bytes_up:  # until nothing more crosses
            crossed = wan.bytes_up
            await asyncio.sleep(0.3)
        assert 0 < crossed < n_bytes / 2
        assert sum(end._transport.get_write_buffer_size() for end in wan._ends if end._transport) < 1_000_000
        read.set()
        assert await reader.read() == b""
        assert sink.n_bytes == n_bytes


async def test_a_link_with_a_delay_and_no_cap_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_UNDER_WAY_BYTES > 100_000_000
    monkeypatch.setattr("fednats.testbed.wan_direction.MAX_UNDER_WAY_BYTES", 1_000_000)
    sink = Sink()
    async with link("delay_ms=50", sink) as wan:
        sending = asyncio.create_task(send(wan, 8_000_000))
        while not sending.done():
            assert wan._up._under_way_bytes <= 1_000_000 + wan._up.read_bytes
            await asyncio.sleep(0.005)
        await sending
    assert sink.n_bytes == 8_000_000


async def test_a_cut_link_is_silent_and_a_mended_one_resets_what_lived_through_it() -> None:
    async with link() as wan, connected(wan) as old:
        assert await ask(old, b"hello") == b"hello"
        wan.cut()
        assert await silent(old)
        async with connected(wan) as during:
            assert await silent(during)
            wan.restore()
            assert await gone(during)
        assert await gone(old)
        async with connected(wan) as new:
            assert await ask(new, b"again") == b"again"


async def test_what_is_under_way_is_lost_in_a_cut() -> None:
    sink = Sink()
    async with link("delay_ms=100", sink) as wan, connected(wan) as (_, writer):
        writer.write(b"first")
        await until(lambda: sink.n_bytes == 5)
        writer.write(b"lost")
        await until(lambda: bool(wan._up._under_way))
        wan.cut()
        await asyncio.sleep(0.2)
        wan.restore()
        await asyncio.sleep(0.2)
        assert sink.n_bytes == 5
        assert wan.bytes_up == 5


async def test_a_cut_and_restore_at_once_is_a_reset() -> None:
    async with link() as wan, connected(wan) as connection:
        assert await ask(connection, b"hello") == b"hello"
        wan.cut()
        wan.restore()
        assert await gone(connection)


async def test_cuts_by_schedule() -> None:
    async with link("cut_at_s=0.2,cut_for_s=0.2,cut_every_s=0.5") as wan:
        started = time.monotonic()
        seen = [wan.is_cut]
        while len(seen) < 5:
            if wan.is_cut != seen[-1]:
                seen.append(wan.is_cut)
            await asyncio.sleep(0.005)
        assert seen == [False, True, False, True, False]
        assert time.monotonic() - started >= 0.2 + 0.5 + 0.2


async def test_a_half_closed_connection_still_answers() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(str(len(await reader.read())).encode())
        writer.close()

    async with link("delay_ms=10", answer) as wan, connected(wan) as (reader, writer):
        writer.write(b"12345")
        writer.write_eof()
        assert await reader.read() == b"5"
        await until(lambda: not wan._ends)


async def test_a_target_that_is_down_resets_and_one_that_is_back_is_reached() -> None:
    async with link() as wan:
        server = await asyncio.start_server(echo, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        server.close()
        await server.wait_closed()
        async with Wan(WanSettings(), "127.0.0.1", port) as other:
            async with connected(other) as connection:
                assert await gone(connection)
            async with await asyncio.start_server(echo, "127.0.0.1", port), connected(other) as connection:
                assert await ask(connection, b"hello") == b"hello"
        async with connected(wan) as connection:
            assert await ask(connection, b"hello") == b"hello"


async def test_a_target_that_resets_just_before_the_end_of_a_stream_arrives_stalls_nobody_else() -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as target:
        target.settimeout(0)
        port = target.getsockname()[1]
        async with asyncio.timeout(LIMIT_S), Wan(parse_wan("delay_ms=100"), "127.0.0.1", port) as wan:
            async with connected(wan) as (_, ending):
                first, _ = await loop.sock_accept(target)
                first.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
                ending.write_eof()
                await until(lambda: bool(wan._up._under_way))
                loop.call_at(wan._up._under_way[0].arrives - 0.001, first.close)
                time.sleep(0.15)  # noqa: ASYNC251 -- both are due now, so the loop runs one right after the other
            async with connected(wan) as (_, writer):
                other, _ = await loop.sock_accept(target)
                with other:
                    writer.write(b"hello")
                    assert await loop.sock_recv(other, 5) == b"hello"


async def test_leaving_closes_every_connection() -> None:
    async with link() as wan:
        reader, writer = await asyncio.open_connection("127.0.0.1", wan.port)
        await ask((reader, writer), b"hello")
    assert await gone((reader, writer))
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", wan.port)
    writer.close()


def test_the_same_seed_draws_the_same_jitter() -> None:
    def draws(seed: int) -> list[float]:
        wan = Wan(WanSettings(jitter_ms=10), "127.0.0.1", 1, seed=seed)
        return [direction._random.random() for direction in (wan._up, wan._down) for _ in range(3)]

    assert draws(1) == draws(1)
    assert len({number for seed in range(3) for number in draws(seed)}) == 18


def test_settings_from_one_line() -> None:
    assert parse_wan("delay_ms=150, mbit=20") == WanSettings(delay_ms=150, mbit=20)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("delay=150", "'delay' is no setting of a link.*delay_ms, jitter_ms, mbit, cut_at_s"),
        ("delay_ms", "KEY=NUMBER"),
        ("delay_ms=slow", "delay_ms: .*number"),
        ("mbit=0", "mbit: .*greater than 0"),
        ("cut_for_s=3", "need cut_at_s"),
        ("cut_at_s=1,cut_for_s=3,cut_every_s=3", "longer than cut_for_s"),
    ],
)
def test_a_wrong_line_is_named(text: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse_wan(text)
