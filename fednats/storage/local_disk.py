"""A local disk that is full or broken, told as one error."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fednats.errors import LocalStorageError


@contextmanager
def local_disk(directory: Path) -> Iterator[None]:
    """Turn what the operating system says of ``directory`` into a LocalStorageError with the remedy."""
    try:
        yield
    except OSError as error:
        raise LocalStorageError(f"{directory}: {error}; make room on its disk") from error
