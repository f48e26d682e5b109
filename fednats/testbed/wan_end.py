"""One side of a connection over a link."""

import asyncio
import socket
import struct
from collections.abc import Callable
from functools import partial
from typing import cast

from fednats.testbed.wan_direction import Direction, Hold

_LINGER_0 = struct.pack("ii", 1, 0)
"""SO_LINGER that makes the kernel end a connection with RST."""


class End(asyncio.BufferedProtocol):
    """What comes in here goes over ``out`` to the ``peer``, the end on the other side.

    ``opened`` and ``closed`` are told of this end's life.
    """

    def __init__(self, out: Direction, opened: Callable[["End"], None], closed: Callable[["End"], None]) -> None:
        self.peer: End | None = None
        self._out = out
        self._opened = opened
        self._closed = closed
        self._holds: set[Hold] = set()
        self._buffer = memoryview(bytearray(out.read_bytes))
        self._transport: asyncio.Transport | None = None
        self._received_eof = self._sent_eof = False

    @property
    def closing(self) -> bool:
        """Whether nothing can be written here any more."""
        return self._transport is None or self._transport.is_closing()

    def hold(self, why: Hold) -> None:
        """Read nothing until released."""
        self._holds.add(why)
        if self._transport is not None:
            self._transport.pause_reading()

    def release(self, why: Hold) -> None:
        """Read again, if nothing else holds."""
        self._holds.discard(why)
        if not self._holds and self._transport is not None:
            self._transport.resume_reading()

    def reset(self) -> None:
        """End the connection now; the other side sees a reset."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
            self._transport.abort()

    # --- what the event loop calls ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Open."""
        self._transport = cast(asyncio.Transport, transport)
        self._opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the link has its own grain
        """Say where to read to."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Send what was read."""
        if self.peer is not None:
            self._out.carry(self, nbytes, partial(self.peer.write, bytes(self._buffer[:nbytes])))

    def eof_received(self) -> bool:
        """Send the end of the stream on; this side can still be written to."""
        self._received_eof = True
        if self.peer is not None:
            self._out.carry(self, 0, self.peer.write_eof)
        return not self._sent_eof

    def connection_lost(self, exc: Exception | None) -> None:
        """Close the other side as this one was, when the link has carried it there."""
        self._closed(self)
        if self.peer is not None:
            self._out.carry(self, 0, self.peer.reset if exc is not None else self.peer.close)

    def pause_writing(self) -> None:
        """Hold the other side back while this one's reader is slow."""
        if self.peer is not None:
            self.peer.hold(Hold.SLOW)

    def resume_writing(self) -> None:
        """Let the other side go on."""
        if self.peer is not None:
            self.peer.release(Hold.SLOW)

    # --- what the link calls when something arrives -------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Hand over what has arrived."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def write_eof(self) -> None:
        """Hand the end of the stream over; both ends said so: close."""
        self._sent_eof = True
        if self._transport is not None and not self._transport.is_closing():
            try:
                self._transport.write_eof()
            except OSError:  # reset, and the loop has not told us yet
                self.reset()
                return
            if self._received_eof:
                self._transport.close()

    def close(self) -> None:
        """Close when everything is written."""
        if self._transport is not None:
            self._transport.close()
