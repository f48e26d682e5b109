"""Checks that a secret file is closed to others: it belongs to its owner alone, or root gave it to the daemon.

The rules are those of OpenSSH and PostgreSQL (``ssl_key_file``), plus one for containers, whose secrets have fixed
modes.
"""

import os
import stat
from pathlib import Path

_OTHERS_ANYTHING = 0o077
_BEYOND_GROUP_READ = 0o037
_OTHERS_WRITE = 0o022
_MEMORY = {"tmpfs", "ramfs"}
_MOUNTS = Path("/proc/self/mountinfo")


def check_closed(path: Path) -> None:
    """Refuse a secret that others may read. A missing file passes; its reader reports it.

    Accepted are

    - 0600 or less: only the owner may read,
    - 0640 or less, owned by root, for a daemon that is not root: root chose the group (Kubernetes with ``fsGroup``),
    - owned by root, writable by nobody else, on a read-only mount in memory: how Kubernetes and Docker hand secrets to
      a container (0444, 0644). Who else runs in that container is decided there.

    Raises:
        ValueError: others may read it; the text has its mode, owner and the remedy.
    """
    try:
        found = path.stat()
    except OSError:
        return
    mode = stat.S_IMODE(found.st_mode)
    if not mode & _OTHERS_ANYTHING:
        return
    if found.st_uid == 0:
        if os.geteuid() != 0 and not mode & _BEYOND_GROUP_READ:
            return
        if not mode & _OTHERS_WRITE and _on_secret_mount(path):
            return
    raise ValueError(
        f"{path} is secret, and others may read it (mode {mode:o}, owner {found.st_uid}): chmod 600 {path};"
        " for a daemon that is not root it may be root's with mode 640 (Kubernetes: defaultMode 0440 and fsGroup),"
        " or root's on a read-only tmpfs, as containers get their secrets"
    )


def _on_secret_mount(path: Path) -> bool:
    """Whether ``path`` is on a read-only mount in memory."""
    real = path.resolve()
    try:
        lines = _MOUNTS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    deepest, accepted = -1, False
    for line in lines:  # proc_pid_mountinfo(5); if two mounts share a place, the later one is on top
        mounted, _, source = line.partition(" - ")
        place = Path(mounted.split()[4].encode().decode("unicode_escape"))
        if (depth := len(place.parts)) >= deepest and real.is_relative_to(place):
            deepest = depth
            accepted = "ro" in mounted.split()[5].split(",") and source.split()[0] in _MEMORY
    return accepted
