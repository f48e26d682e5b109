"""The chunks of one payload on disk: outgoing until they are sent, incoming until all have arrived."""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from fednats import wire
from fednats.messages import Payload

_LENGTH = struct.Struct(">I")

MAX_CHUNK_BYTES = wire.MAX_MESSAGE_BYTES + wire.ROOM_BYTES
"""No longer chunk is ever written. The limit is checked before memory for a chunk is allocated."""


class ChunkFile:
    """Chunks one after the other, each preceded by its length (u32, big endian)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._sizes: list[int] = []
        self._digests: list[bytes] = []
        self._file = path.open("ab")

    def append(self, chunk: bytes) -> None:
        """Add one chunk."""
        self._file.write(_LENGTH.pack(len(chunk)))
        self._file.write(chunk)
        self._sizes.append(len(chunk))
        self._digests.append(wire.digest(chunk))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; everything appended is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def payload(self, payload_id: str) -> Payload:
        """Return the payload entry of a head for the chunks appended."""
        return Payload(payload_id=payload_id, n_bytes=sum(self._sizes), digests=tuple(self._digests))


def read_chunks(path: Path) -> Iterator[bytes]:
    """Yield the chunks of a file; a truncated or damaged file ends with its last whole chunk."""
    with path.open("rb") as file:
        while len(length := file.read(_LENGTH.size)) == _LENGTH.size:
            (n_bytes,) = _LENGTH.unpack(length)
            if n_bytes > MAX_CHUNK_BYTES or len(chunk := file.read(n_bytes)) < n_bytes:
                return
            yield chunk


def keep_sound(path: Path, digests: Sequence[bytes]) -> int:
    """Truncate ``path`` (it may be absent) after the leading chunks that match ``digests``; return how many match."""
    if not path.exists():
        return 0
    sound = n_bytes = 0
    for chunk, expected in zip(read_chunks(path), digests, strict=False):
        if wire.digest(chunk) != expected:
            break
        sound += 1
        n_bytes += _LENGTH.size + len(chunk)
    os.truncate(path, n_bytes)
    return sound
