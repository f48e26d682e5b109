"""``fednats run`` starts again what dies, as a supervisor does in the field."""

import asyncio
import os
import signal
from pathlib import Path

import pytest

from fednats.errors import ConfigError
from fednats.provision.plan import Kits
from fednats.testbed import launch
from fednats.testbed.launch import run_federation
from fednats.testbed.ledger import verify
from tests.e2e.conftest import MakeFederation
from tests.e2e.until import LIMIT_S

STOP = {"max_versions": 14}


async def test_whatever_is_killed_under_fednats_run_is_started_again(
    make_federation: MakeFederation, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, stop=STOP)
    killed = {"site a": f"{output}/site-a/site.toml", "aggregator north": f"{output}/aggregator-north/aggregator.toml"}
    killed |= {"nats-server south": str(Kits(output / launch.KITS).server("south") / "server.log")}
    run = asyncio.create_task(run_federation(federation, output))
    try:
        async with asyncio.timeout(LIMIT_S):
            while not (output / "coordinator" / "checkpoints").exists() or not verified(output):
                assert not run.done(), run.exception()
                await asyncio.sleep(0.2)
            for named in killed.values():
                os.kill(pid_of(named), signal.SIGKILL)
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
    """Whether a version has been made of the hospitals' updates."""
    try:
        return verify(output).accepted.total() > 0
    except ConfigError:
        return False


def pid_of(argument: str) -> int:
    """Return the process that was started with an argument that ends so."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_text().split("\0")
        except OSError:
            continue
        if any(given.endswith(argument) for given in arguments):
            return int(process.name)
    raise AssertionError(f"nothing runs with {argument}")
