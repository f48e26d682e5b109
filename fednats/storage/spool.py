"""A payload on its way out, on disk until all of it is known to be good."""

from collections.abc import Iterator
from pathlib import Path
from typing import Self

from fednats import wire
from fednats.errors import LocalStorageError
from fednats.messages import Payload


class Spool:
    """Chunks appended to a file; a context manager that removes it."""

    def __init__(self, path: Path, payload_id: str) -> None:
        self._path = path
        self._payload_id = payload_id
        self._sizes: list[int] = []
        self._digests: list[bytes] = []

    def __enter__(self) -> Self:
        self._file = self._path.open("w+b", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._path.unlink()

    def append(self, chunk: bytes) -> None:
        """Add one chunk.

        Raises:
            LocalStorageError: the disk is full or broken.
        """
        left = memoryview(chunk)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise LocalStorageError(
                f"{self._path}: a sum cannot be written ({error.strerror}); make room on its disk, then start again:"
                " nothing is lost, the sum is made again"
            ) from error
        self._sizes.append(len(chunk))
        self._digests.append(wire.digest(chunk))

    def chunks(self) -> Iterator[bytes]:
        """Yield the chunks from the first on."""
        self._file.seek(0)
        for size in self._sizes:
            yield self._file.read(size)

    @property
    def payload(self) -> Payload:
        """What the head says of the chunks."""
        return Payload(payload_id=self._payload_id, n_bytes=sum(self._sizes), digests=tuple(self._digests))
