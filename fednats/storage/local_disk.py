"""One error for a local disk that is full or broken."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fednats.errors import LocalStorageError


@contextmanager
def local_disk(directory: Path) -> Iterator[None]:
    """Turn an OSError of an operation in ``directory`` into a LocalStorageError with the remedy."""
    try:
        yield
    except OSError as error:
        raise LocalStorageError(f"{directory}: {error}; make room on its disk") from error
