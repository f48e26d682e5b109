"""Copies of daemons, as a copied machine has them: the same name, keys and state, in another place."""

import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fednats.services.daemon.state_dir import LOCK_FILE
from fednats.testbed.launch import Running
from fednats.testbed.processes import LOG_FILE, DaemonProcess
from fednats.web.server import PORT_FILE

LEFT_OUT = shutil.ignore_patterns(LOCK_FILE, PORT_FILE, LOG_FILE)


def frozen_copy(daemon: DaemonProcess, folder: Path) -> None:
    """Let a daemon and its worker stand still until `goes_on`, and copy their state to ``folder``, all of one moment."""
    os.killpg(daemon.pid, signal.SIGSTOP)  # it leads a session of its own
    shutil.copytree(daemon.state_dir, folder, ignore=LEFT_OUT)


def goes_on(daemon: DaemonProcess) -> None:
    """Let a daemon go on that stood still."""
    os.killpg(daemon.pid, signal.SIGCONT)


@asynccontextmanager
async def copied(now: Running, name: str, folder: Path, **settings: Any) -> AsyncIterator[DaemonProcess]:
    """Start a copy of the daemon ``name`` on the state in ``folder``, and kill it in the end."""
    true = now.daemons[name]
    copy = DaemonProcess(true.role, name, true.settings.model_copy(update={"state_dir": folder, **settings}))
    await copy.start()
    try:
        yield copy
    finally:
        await copy.kill()


async def puts_in_place_of(now: Running, name: str, folder: Path) -> None:
    """Go on with the state in ``folder`` as that of the daemon ``name``, which has ended."""
    daemon = now.daemons[name]
    await daemon.kill()
    log = daemon.log_file.read_bytes()
    shutil.rmtree(daemon.state_dir)
    shutil.move(folder, daemon.state_dir)
    with daemon.log_file.open("ab") as file:
        file.write(log)
    await daemon.start()
