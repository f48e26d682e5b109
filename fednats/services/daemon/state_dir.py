"""A daemon's ``state_dir``: closed to other users, and used by one daemon at a time."""

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fednats.errors import ConfigError

LOCK_FILE = "daemon.lock"

_OTHERS_WRITE, _GROUP_WRITES = 0o002, 0o020


@contextmanager
def own(state_dir: Path) -> Iterator[None]:
    """Lock ``state_dir`` against other daemons while the context is open, and make new files private.

    The process's umask is set for good: all files that the daemon and its worker write, here or elsewhere, have mode
    0600. A missing folder is made with mode 0700. An existing one, such as a volume or the target of a link, keeps its
    mode and owner. It is refused if other users may write in it, because they could replace the daemon's files.

    Raises:
        ConfigError: the folder cannot be made, written or locked, others may write in it, or a daemon runs on it.
    """
    os.umask(0o077)
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        _refuse_open(state_dir, state_dir.stat())
        lock = os.open(state_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"state_dir: {state_dir} cannot be made or written ({error.strerror}); give a folder that this user may write"
        ) from error
    try:
        _lock(lock, state_dir)
        yield
    finally:
        os.close(lock)


def _refuse_open(state_dir: Path, found: os.stat_result) -> None:
    mode = stat.S_IMODE(found.st_mode)
    roots_group = found.st_uid == 0 and os.geteuid() != 0  # a Kubernetes volume with fsGroup
    if mode & _OTHERS_WRITE or (mode & _GROUP_WRITES and not roots_group):
        raise ConfigError(
            f"state_dir: others may write in {state_dir} (mode {mode:o}, owner {found.st_uid}), and so change what the daemon"
            f" remembers; name a folder in it that is not there yet, such as {state_dir / 'state'}, or chmod 700 {state_dir}"
        )


def _lock(lock: int, state_dir: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"state_dir: a daemon runs on {state_dir} already, and two would spoil each other's records; stop it first"
        ) from None
    except OSError as error:
        raise ConfigError(f"state_dir: {state_dir} cannot be locked ({error.strerror}); give a local folder") from error
