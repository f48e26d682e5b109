"""Several runs on one set of kits, ordered by an operator's commands, while some daemons are killed."""

import asyncio
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tomli_w
from safetensors.numpy import load_file, save_file

from fednats.storage.checkpoints import BEST_FILE, checkpoints_folder, weights_file
from fednats.testbed.launch import COORDINATOR, Running, running
from fednats.verify.joined import APPLIED
from tests.e2e.conftest import MakeFederation
from tests.e2e.ledgers import audited, balanced
from tests.e2e.until import Statuses, closed_at, until

LIMIT_S = 150
EVERYBODY = (COORDINATOR, "aggregator-north", "aggregator-south", "site-a", "site-b", "site-c", "site-d")
SECOND = {
    "name": "second",
    "seed": 3,
    "training": {"local_steps": 10, "batch_size": 16, "learning_rate": 0.02},
    "server": {"optimizer": "adam", "learning_rate": 0.01},
    "stop": {"max_versions": 3},
}


async def run(output: Path, *arguments: str, code: int = 0) -> str:
    """Run ``fednats run`` with these arguments, from the coordinator's kit."""
    done = await asyncio.to_thread(
        subprocess.run,
        [
            sys.executable,
            "-m",
            "fednats",
            "run",
            *arguments,
            "--config",
            str(output / "kits/coordinator/coordinator.toml"),
        ],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def of_run(name: str, opened_at: int) -> Callable[[Statuses], bool]:
    """Return a check that the coordinator has closed this run and all daemons know."""

    def holds(statuses: Statuses) -> bool:
        opening = statuses.get(COORDINATOR, {}).get("opening") or {}
        return (opening.get("name"), opening.get("opened_at")) == (name, opened_at) and closed_at(*EVERYBODY)(statuses)

    return holds


def order_file(folder: Path, **changes: object) -> str:
    file = folder / "run.toml"
    file.write_text(tomli_w.dumps({**SECOND, **changes}))
    return str(file)


def keys(output: Path) -> dict[str, str]:
    """Return digests of all files in the kits, except those that servers write."""
    files = [file for file in (output / "kits").glob("*/*") if file.is_file() and file.suffix != ".log"]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def same(one: Path, other: Path) -> bool:
    """Return whether two files hold the same tensors."""
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def pids(now: Running) -> dict[str, int]:
    return {name: now.daemons[name].pid for name in EVERYBODY}


async def test_kits_serve_run_after_run_and_nobody_is_given_new_keys(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, stop={"max_versions": 3})
    output, folder = tmp_path / "out", checkpoints_folder(tmp_path / "out" / COORDINATOR)
    async with running(federation, output) as now:
        await until(now, of_run("small", 0))
        handed_out, before = keys(output), pids(now)
        first_best = load_file(folder / BEST_FILE)

        refused = await run(output, "start", order_file(tmp_path, delta={"value_bits": 4}), code=1)
        assert "delta.value_bits = 4" in refused
        assert "Set them as the kits were made with, 8 and 500" in refused
        plain = await run(output, "start", order_file(tmp_path, delta={"cipher": "none"}), code=1)
        assert 'delta.cipher is "none", but the kits have keys' in plain
        assert "stepz" in await run(output, "start", order_file(tmp_path, stepz=1), code=1)
        other = tmp_path / "other.safetensors"
        save_file({**first_best, "0.weight": np.zeros((16, 29), np.float32)}, other)
        misfit = await run(output, "start", order_file(tmp_path, initial_model=str(other)), code=1)
        assert "0.weight is 16x29 in it, 16x30 in the task's model" in misfit
        assert "there was a run 'small' already" in await run(
            output, "start", order_file(tmp_path, name="small"), code=1
        )

        assert "up to 2 more versions" in await run(output, "extend", "--versions", "2")
        await now.daemons[COORDINATOR].kill()
        await now.daemons[COORDINATOR].start()
        await until(now, of_run("small", 4))
        best = tmp_path / "best.safetensors"
        best.write_bytes((folder / BEST_FILE).read_bytes())
        last = tmp_path / "last.safetensors"
        last.write_bytes(weights_file(folder, 6).read_bytes())

        await now.daemons["site-b"].kill()
        started = await run(output, "start", order_file(tmp_path, initial_model=str(best)))
        assert "run second is open, its first version is 7" in started
        assert "one run at a time" in await run(output, "extend", "--versions", "1", code=1)
        await now.daemons["site-b"].start()
        assert (await until(now, of_run("second", 7)))[COORDINATOR]["version"] == 10
        listed = await run(output, "list")
        assert keys(output) == handed_out
        after = pids(now)
        assert {name for name in EVERYBODY if after[name] != before[name]} == {COORDINATOR, "site-b"}

        ledger = await balanced(output)
    small, second = (next(line for line in listed.splitlines() if f" {name} " in line) for name in ("small", "second"))
    assert "0 to 6" in small
    assert "7 to 10" in second
    assert "closed" in second
    assert ledger.runs == [
        "run small: versions 0 to 6, extended at version 4, closed: max_versions reached",
        "run second: versions 7 to 10, closed: max_versions reached",
    ]
    assert ledger.accepted[APPLIED] > 0
    assert same(weights_file(folder, 7), best), "it begins where the best version of the first run was"
    assert same(folder / "runs" / "small" / "last.safetensors", last)
    assert (folder / "runs" / "small" / BEST_FILE).read_bytes() == best.read_bytes()
    recorded = audited(output)
    for name in EVERYBODY:
        assert {record.name for record in recorded[name] if record.what == "run"} == {"small", "second"}
