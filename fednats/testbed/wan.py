"""A wide-area link on one machine: a TCP proxy with delay, jitter, a bandwidth cap, and cuts."""

import asyncio
import math
import socket
from collections.abc import Coroutine
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import structlog
from pydantic import Field, model_validator

from fednats.config import Settings, parse
from fednats.errors import ConfigError
from fednats.testbed.wan_direction import Direction, Hold
from fednats.testbed.wan_end import End

RECEIVE_BUFFER_BYTES = 64 * 1024
"""The kernel's buffer in front of a link with a bandwidth cap; a larger one would be a second, hidden queue."""

_MEGABIT_BYTES = 1e6 / 8

log = structlog.get_logger()


class WanSettings(Settings):
    """Properties of a link; the defaults make a perfect one. Scheduled cuts count from the start of the link."""

    delay_ms: float = Field(0.0, ge=0, description="one way")
    jitter_ms: float = Field(0.0, ge=0, description="up to so much on top of the delay; bytes stay in order")
    mbit: float | None = Field(None, gt=0, description="1e6 bits per second and direction; none: as the machine can")
    cut_at_s: float | None = Field(None, ge=0, description="first cut")
    cut_for_s: float | None = Field(None, gt=0, description="length of each cut; none: for good")
    cut_every_s: float | None = Field(None, gt=0, description="from one cut to the next; none: only one")

    @model_validator(mode="after")
    def _cuts_fit(self) -> "WanSettings":
        if self.cut_at_s is None and (self.cut_for_s is not None or self.cut_every_s is not None):
            raise ValueError("cut_for_s and cut_every_s need cut_at_s, the time of the first cut")
        if self.cut_every_s is not None and not (self.cut_for_s or math.inf) < self.cut_every_s:
            raise ValueError("cut_every_s must be longer than cut_for_s, and needs it")
        return self


def parse_wan(text: str) -> WanSettings:
    """Read a link's settings from one line.

    >>> parse_wan("delay_ms=150,mbit=20").delay_ms
    150.0

    Raises:
        ConfigError: a key is unknown or its value is wrong; the text names the key.
    """
    raw: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or key not in WanSettings.model_fields:
            known = ", ".join(WanSettings.model_fields)
            raise ConfigError(f"{text!r}: {key!r} is no setting of a link; give KEY=NUMBER,... of {known}")
        raw[key] = value
    return parse(raw, WanSettings, source=repr(text))


class Wan:
    """One link, which listens on a port of 127.0.0.1 and leads to ``host:port``; an async context manager.

    All connections share it. Each direction sends at ``mbit``, and bytes arrive ``delay_ms`` (and jitter) later. A full
    queue holds senders back. The same ``seed`` gives the same jitter.
    """

    def __init__(self, settings: WanSettings, host: str, port: int, *, name: str = "wan", seed: int = 0) -> None:
        self.settings = settings
        self.name = name
        self.port = 0
        self.is_cut = False
        self._target = (host, port)
        rate = math.inf if settings.mbit is None else settings.mbit * _MEGABIT_BYTES
        delay_s, jitter_s = settings.delay_ms / 1000, settings.jitter_ms / 1000
        self._delay_s = delay_s
        self._up = Direction(rate, delay_s, jitter_s, seed=2 * seed)
        self._down = Direction(rate, delay_s, jitter_s, seed=2 * seed + 1)
        self._ends: set[End] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        """URL to connect to in place of the target."""
        return f"tls://127.0.0.1:{self.port}"

    @property
    def bytes_up(self) -> int:
        """Bytes that arrived at the target."""
        return self._up.crossed_bytes

    @property
    def bytes_down(self) -> int:
        """Bytes that arrived from the target."""
        return self._down.crossed_bytes

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        sock = self._socket()
        sock.bind(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        self._server = await loop.create_server(lambda: End(self._up, self._opened, self._ends.discard), sock=sock)
        if self.settings.cut_at_s is not None:
            self._start(self._cut_by_schedule(self.settings.cut_at_s), "cuts")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for direction in (self._up, self._down):
            direction.cut()
        for end in self._ends:
            end.reset()
        await asyncio.sleep(0)  # lets the loop close the reset connections

    def cut(self) -> None:
        """Lose all packets, both ways; new connections are accepted but get nothing."""
        if self.is_cut:
            return
        self.is_cut = True
        for direction in (self._up, self._down):
            direction.cut()
        for end in self._ends:
            end.hold(Hold.CUT)
        log.info("wan_cut", link=self.name)

    def restore(self) -> None:
        """Restore the link; reset connections from before or during the cut."""
        if not self.is_cut:
            return
        self.is_cut = False
        for direction in (self._up, self._down):
            direction.restore()
        for end in self._ends:
            end.reset()
        log.info("wan_restored", link=self.name)

    def _opened(self, end: End) -> None:
        self._ends.add(end)
        if self.is_cut:
            end.hold(Hold.CUT)
        elif end.peer is None:
            end.hold(Hold.CONNECTING)
            self._start(self._connect(end), "connect")

    async def _connect(self, near: End) -> None:
        """Open the far side of a connection, one delay after the near side."""
        await asyncio.sleep(self._delay_s)
        if near.closing:
            return
        loop = asyncio.get_running_loop()
        with ExitStack() as unused:
            sock = unused.enter_context(self._socket())
            sock.settimeout(0)
            try:
                await loop.sock_connect(sock, self._target)
            except OSError:
                near.reset()
                return
            if near.closing or self.is_cut:
                return
            far = End(self._down, self._opened, self._ends.discard)
            far.peer, near.peer = near, far
            await loop.create_connection(lambda: far, sock=sock)
            unused.pop_all()
        near.release(Hold.CONNECTING)

    async def _cut_by_schedule(self, at_s: float) -> None:
        length_s, period_s = self.settings.cut_for_s, self.settings.cut_every_s
        await asyncio.sleep(at_s)
        self.cut()
        while length_s is not None:
            await asyncio.sleep(length_s)
            self.restore()
            if period_s is None:
                return
            await asyncio.sleep(period_s - length_s)
            self.cut()

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=f"{self.name}: {name}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _socket(self) -> socket.socket:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # so that asyncio sets TCP_NODELAY
        if self.settings.mbit is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        return sock
