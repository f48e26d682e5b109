"""A daemon's ``state_dir``: closed to other users, and one daemon's at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fednats.errors import ConfigError

LOCK_FILE = "daemon.lock"


@contextmanager
def own(state_dir: Path) -> Iterator[None]:
    """Make ``state_dir`` and keep other users, and other daemons, out of it while the context is open.

    The process's umask is set for good: whatever the daemon and its worker write, there or elsewhere, is theirs alone.

    Raises:
        ConfigError: it cannot be made, is another user's, or a daemon runs on it.
    """
    os.umask(0o077)
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        state_dir.chmod(0o700)
        lock = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"state_dir: {state_dir} cannot be made or closed to other users ({error.strerror}); give a folder of this user's"
        ) from error
    try:
        _lock(lock, state_dir)
        yield
    finally:
        os.close(lock)


def _lock(lock: int, state_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"state_dir: a daemon runs on {state_dir} already, and two would spoil each other's records; stop it first"
        ) from None
    except OSError as error:
        raise ConfigError(f"state_dir: {state_dir} cannot be locked ({error.strerror}); give a local folder") from error
