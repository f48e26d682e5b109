"""The command line, as users run it."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.e2e.conftest import MakeFederation, users_of
from tests.patients import write_german_csv

HEART = Path(os.environ.get("HEART_DATA") or Path(__file__).parents[2] / ".." / "shared" / "data" / "heart")
SHIPPED_TASK = f"{Path(__file__).parents[2] / 'sites' / 'own_task.py'}:MyTask"
LIMIT_S = 200


def fednats(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fednats", *arguments]


def run(arguments: Sequence[str], *, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        fednats(*arguments),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == code, done.stderr
    return done


def logged(output: Path, site: str, event: str) -> list[dict[str, Any]]:
    """Return the entries of ``event`` in a site's log."""
    lines = map(json.loads, (output / f"site-{site}" / "daemon.log").read_text().splitlines())
    return [line for line in lines if line["event"] == event]


def passes_s(output: Path, site: str) -> list[float]:
    """Return the duration of each training pass of a site, from its log."""
    return [line["train_s"] for line in logged(output, site, "trained")]


def test_a_federation_file_runs_to_the_table(make_federation: MakeFederation, tmp_path: Path) -> None:
    training = {"local_steps": 400, "batch_size": 16, "learning_rate": 0.01}
    federation = make_federation({"north": ["a", "b"]}, training=training, stop={"max_versions": 2}, task=SHIPPED_TASK)
    for seed, site in enumerate(federation.sites.values()):
        write_german_csv(Path(site.options["csv"]), n=150, seed=seed)
    file = tmp_path / "federation.toml"
    file.write_text(tomli_w.dumps(federation.model_dump(mode="json", exclude_none=True)))
    output = tmp_path / "out"
    printed = run(["run", str(file), "--slow", "b=10x", "--output", str(output)]).stdout
    assert "the federation" in printed
    assert "all data pooled" in printed
    assert json.loads((output / "summary.json").read_text())["versions"] == 2
    assert min(passes_s(output, "b")) > 3 * min(passes_s(output, "a"))
    assert len(logged(output, "b", "update_stored")) == 2, "a pass that the end of the run came upon is not sent"
    assert "4 = applied 4" in run(["verify", str(output)]).stdout
    assert not users_of(output)
    again = run(["run", str(file), "--output", str(output)], code=1)
    assert "holds a federation already" in again.stderr


async def test_ctrl_c_leaves_nothing_running(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = await asyncio.create_subprocess_exec(
        *fednats("demo", "--task", "breast-cancer", "--sites", "4", "--output", str(output)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(LIMIT_S):
        first = await process.stdout.readline()  # the first version is evaluated, so everything runs
        assert first.startswith(b"version 0")
        assert len(users_of(output)) >= 3 + 7
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
    assert process.returncode == 130
    assert b"interrupted" in errors
    assert not users_of(output)


@pytest.mark.skipif(not HEART.is_dir(), reason="the UCI heart disease files are not at HEART_DATA")
def test_four_real_hospitals_beat_the_mean_hospital_alone(tmp_path: Path) -> None:
    run(["demo", "--task", "heart", "--data", str(HEART), "--output", str(tmp_path / "out")])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["cipher"] == "bfv"
    assert len(summary["sites"]) == 4
    assert summary["federated"]["auc"] > summary["local"]["auc"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["demo", "--task", "no-such-task"], "no-such-task"),
        (["demo", "--regions", "4"], "--regions 4"),
        (["demo", "--task", "heart"], "--data"),
        (["demo", "--task", "heart", "--data", "/absent"], "/absent"),
        (["demo", "--task", "breast-cancer", "--slow", "b=10x"], "no such site; there are hospital-1, hospital-2"),
        (["demo", "--task", "breast-cancer", "--slow", "hospital-1"], "give SITE=FACTOR"),
        (["demo", "--task", "breast-cancer", "--wan", "delay=1"], "delay_ms, jitter_ms, mbit"),
        (["link", "show", "--output", "absent"], "no federation runs there"),
        (["run", "absent.toml"], "absent.toml: no such file"),
        (["site", "--config", "absent.toml"], "absent.toml: no such file"),
        (["verify", "/absent"], "/absent: holds no coordinator/journal.sqlite"),
        (["audit", "verify", "/absent"], "/absent: cannot be read"),
        (["audit", "show", "/absent", "--signers", "absent.toml"], "absent.toml: no such file"),
    ],
)
def test_wrong_arguments_are_named_in_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    output = ["--output", str(tmp_path / "out")] if arguments[0] in {"demo", "run"} else []
    is_daemon = arguments[0] in {"site", "aggregator", "coordinator"}
    errors = run([*arguments, *output], code=78 if is_daemon else 1).stderr  # 78: a restart would not help
    assert expected in errors
    assert "Traceback" not in errors


def test_help_names_every_command() -> None:
    text = run(["--help"]).stdout
    for command in ("demo", "run", "link", "site", "aggregator", "coordinator", "verify", "audit", "bench"):
        assert command in text
