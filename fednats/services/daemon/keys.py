"""Read key files, and select the key that a run asks for."""

from collections.abc import Callable, Sequence
from pathlib import Path

from fednats.crypto.public import key_id
from fednats.errors import ConfigError, Reason, RefusedError


def read_key(path: Path | None, setting: str) -> bytes | None:
    """Read a key file; return None if ``path`` is None.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error.strerror})") from error


def read_keys(newest: Path | None, older: Path | None, setting: str) -> tuple[bytes, ...]:
    """Read the keys of this epoch and of the one before, if given, the newest first.

    Raises:
        ConfigError: a file cannot be read, or only the older one is given.
    """
    if newest is None and older is not None:
        raise ConfigError(f"older_{setting} is set, but {setting} is not; set it to the key of this epoch")
    keys = (read_key(newest, setting), read_key(older, f"older_{setting}"))
    return tuple(key for key in keys if key is not None)


def held(public_keys: Sequence[bytes], announced: str) -> bytes | None:
    """Return the public key with the id ``announced``, or else the newest; None if there are none."""
    return next((key for key in public_keys if key_id(key) == announced), public_keys[0] if public_keys else None)


def checked_key_id(find: Callable[[], str]) -> str:
    """Return the key id from ``find``. If the key does not fit the announced settings, refuse the run, but keep going.

    Raises:
        RefusedError: ``wrong_key``: ``find`` raised ConfigError.
    """
    try:
        return find()
    except ConfigError as error:
        raise RefusedError(Reason.WRONG_KEY, str(error)) from error
