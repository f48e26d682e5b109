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
    """One side of a connection; sends incoming bytes over ``out`` to its ``peer``, the end on the other side.

    Calls ``opened`` and ``closed`` when the connection opens and closes.
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
        """Whether this end can no longer be written to."""
        return self._transport is None or self._transport.is_closing()

    def hold(self, why: Hold) -> None:
        """Read nothing until released."""
        self._holds.add(why)
        if self._transport is not None:
            self._transport.pause_reading()

    def release(self, why: Hold) -> None:
        """Read again, unless another reason holds."""
        self._holds.discard(why)
        if not self._holds and self._transport is not None:
            self._transport.resume_reading()

    def reset(self) -> None:
        """Abort the connection; the program connected to this end sees a reset."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)
            self._transport.abort()

    # --- called by the event loop -------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport and report the open connection."""
        self._transport = cast(asyncio.Transport, transport)
        self._opened(self)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the link has its own size
        """Return the buffer to read into."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Send the bytes that were read."""
        if self.peer is not None:
            self._out.carry(self, nbytes, partial(self.peer.write, bytes(self._buffer[:nbytes])))

    def eof_received(self) -> bool:
        """Pass on the end of the stream; this side can still be written to."""
        self._received_eof = True
        if self.peer is not None:
            self._out.carry(self, 0, self.peer.write_eof)
        return not self._sent_eof

    def connection_lost(self, exc: Exception | None) -> None:
        """Close or reset the other side, as happened to this one, once that has crossed the link."""
        self._closed(self)
        if self.peer is not None:
            self._out.carry(self, 0, self.peer.reset if exc is not None else self.peer.close)

    def pause_writing(self) -> None:
        """Hold back the other side while this side's reader is slow."""
        if self.peer is not None:
            self.peer.hold(Hold.SLOW)

    def resume_writing(self) -> None:
        """Release the other side."""
        if self.peer is not None:
            self.peer.release(Hold.SLOW)

    # --- called by the link on arrival --------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Write bytes that have arrived."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def write_eof(self) -> None:
        """Write the end of the stream; close if both sides have ended theirs."""
        self._sent_eof = True
        if self._transport is not None and not self._transport.is_closing():
            try:
                self._transport.write_eof()
            except OSError:  # reset, but the loop has not reported it yet
                self.reset()
                return
            if self._received_eof:
                self._transport.close()

    def close(self) -> None:
        """Close once everything is written."""
        if self._transport is not None:
            self._transport.close()
