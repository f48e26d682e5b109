"""Key files, and what a run asks of them."""

from collections.abc import Callable
from pathlib import Path

from fednats.errors import ConfigError, Reason, RefusedError


def read_key(path: Path | None, setting: str) -> bytes | None:
    """Read a key file; None if the setting is not given.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error.strerror})") from error


def key_id_of(find: Callable[[], str]) -> str:
    """Return the key id that ``find`` gives; a key that does not fit the announced settings refuses the run, not more.

    Raises:
        RefusedError: ``wrong_key``.
    """
    try:
        return find()
    except ConfigError as error:
        raise RefusedError(Reason.WRONG_KEY, str(error)) from error
