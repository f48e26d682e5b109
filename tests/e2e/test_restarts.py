"""``fednats run`` restarts processes that die, as a supervisor does in the field."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from fednats.errors import ConfigError
from fednats.provision.plan import Kits
from fednats.testbed import launch
from fednats.testbed.launch import run_federation
from fednats.testbed.processes import LOG_FILE
from fednats.verify.joined import verify
from tests.e2e.conftest import MakeFederation, users_of
from tests.e2e.until import LIMIT_S

STOP = {"max_versions": 14}


async def test_whatever_is_killed_under_fednats_run_is_started_again(
    make_federation: MakeFederation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, stop=STOP)
    killed = {"site a": output / "site-a" / LOG_FILE, "aggregator north": output / "aggregator-north" / LOG_FILE}
    killed |= {"nats-server south": Kits(output / launch.KITS).server("south") / "server.log"}
    run = asyncio.create_task(run_federation(federation, output))
    try:
        async with asyncio.timeout(LIMIT_S):
            while not (output / "coordinator" / "checkpoints").exists() or not verified(output):
                assert not run.done(), run.exception()
                await asyncio.sleep(0.2)
            for log in killed.values():
                os.kill(leader_of(log), signal.SIGKILL)
            summary = await run
    finally:
        run.cancel()
    assert summary.restarts == dict.fromkeys(killed, 1)
    assert summary.versions == STOP["max_versions"]
    printed = capsys.readouterr().out
    assert all(f"{label} ended and was started again (1)" in printed for label in killed)
    assert verify(output).findings == []
    left = [file for file in output.iterdir() if file.is_file()]
    assert {"summary.json", "report.html", "model.safetensors"} <= {file.name for file in left}
    assert not [file for file in output.rglob("*") if file.is_file() and file.stat().st_mode & 0o077]


def verified(output: Path) -> bool:
    """Return whether a version has been made from the hospitals' updates."""
    try:
        return verify(output).accepted.total() > 0
    except ConfigError:
        return False


def leader_of(log: Path) -> int:
    """Return the process that leads the session of the processes that write ``log``."""
    return next(os.getsid(process) for process in users_of(log))
