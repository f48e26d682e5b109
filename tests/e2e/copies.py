"""Copies of daemons, as on a copied machine: the same name, keys and state, in another folder."""

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
    """Stop a daemon and its worker until `goes_on`, and copy their state to ``folder``, all from one moment."""
    os.killpg(daemon.pid, signal.SIGSTOP)  # it leads its own session
    shutil.copytree(daemon.state_dir, folder, ignore=LEFT_OUT)


def goes_on(daemon: DaemonProcess) -> None:
    """Let a stopped daemon go on."""
    os.killpg(daemon.pid, signal.SIGCONT)


@asynccontextmanager
async def copied(now: Running, name: str, folder: Path, **settings: Any) -> AsyncIterator[DaemonProcess]:
    """Start a copy of the daemon ``name`` on the state in ``folder``; kill the copy at the end."""
    true = now.daemons[name]
    copy = DaemonProcess(true.role, name, true.settings.model_copy(update={"state_dir": folder, **settings}))
    await copy.start()
    try:
        yield copy
    finally:
        await copy.kill()


async def puts_in_place_of(now: Running, name: str, folder: Path) -> None:
    """Kill the daemon ``name``, replace its state with the one in ``folder`` and start it; its log stays."""
    daemon = now.daemons[name]
    await daemon.kill()
    log = daemon.log_file.read_bytes()
    shutil.rmtree(daemon.state_dir)
    shutil.move(folder, daemon.state_dir)
    with daemon.log_file.open("ab") as file:
        file.write(log)
    await daemon.start()
