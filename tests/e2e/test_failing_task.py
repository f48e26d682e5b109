"""A task that fails at every site: its deltas jump, which raises an alarm, then its loss raises, which ends the run.

The text of the exception stays at the hospital.
"""

import hashlib
import json
from pathlib import Path

import pytest

from fednats.errors import RunFailedError
from fednats.protocol.outliers import ALARM
from fednats.testbed.launch import COORDINATOR, refuse_failed, running
from tests.e2e.conftest import MakeFederation
from tests.e2e.tap import tapped
from tests.e2e.until import closed, until

RECORD = "Doe-Jane-1950"
CODE = """
from pathlib import Path

import torch
from torch import nn
from fednats import Task

class Failing(Task):
    def __init__(self, records=""):
        self.records = records
        self.n_batches = 0

    def model(self):
        return nn.Linear(3, 2)

    def train_data(self):
        return torch.utils.data.TensorDataset(torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64))

    def test_data(self):
        return torch.utils.data.TensorDataset(torch.zeros(4, 3), torch.tensor([0, 1, 0, 1]))

    def loss(self, model, inputs, targets):
        self.n_batches += 1
        if self.n_batches > 26:  # one a pass
            float(Path(self.records).read_text())
        jump = 1e4 * sum(weights.sum() for weights in model.parameters()) if self.n_batches > 14 else 0.0
        return super().loss(model, inputs, targets) + jump
"""
WHY = "training failed: ValueError (in loss, failing.py line 25)"
JUMPED = "delta_norm_jumped"


async def test_a_run_whose_sites_all_fail_ends_with_the_reason_and_only_their_own_logs_quote_the_record(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    code = tmp_path / "failing.py"
    code.write_text(CODE)
    records = tmp_path / "records.csv"
    records.write_text(RECORD)
    sites = {name: {"region": "north", "options": {"records": str(records)}} for name in "ab"}
    federation = make_federation(
        {"north": ["a", "b"]},
        sites=sites,
        task=f"{code}:Failing",
        delta={"cipher": "none"},
        training={"local_steps": 1, "batch_size": 4, "learning_rate": 0.05},
        defence={"quarantine": False},
        stop={"all_failing_s": 0.5, "max_versions": 10_000},
    )
    output = tmp_path / "out"
    async with running(federation, output) as now, tapped(now.servers) as tap:
        statuses = await until(now, closed)
        for daemon in now.daemons:
            await daemon.stop()
    assert statuses[COORDINATOR]["reason"] == f"every site fails: {WHY}"
    assert statuses[COORDINATOR]["failing"] == {"site.a": WHY, "site.b": WHY}
    assert statuses["aggregator-north"]["failing"] == {"site.a": WHY, "site.b": WHY}
    assert statuses["site-a"]["failing"] == {"site.a": WHY}
    with pytest.raises(RunFailedError, match=r"at version \d+: every site fails: .*site-a/daemon\.log"):
        refuse_failed(statuses, output)
    for name in ("site-a", "site-b"):
        (failed, *_) = [line for line in events(output / name) if line["event"] == "job_failed"]
        assert RECORD in failed["error"]
        assert f"could not convert string to float: '{RECORD}'" in failed["exception"]
        (checked,) = [line for line in events(output / name) if line["event"] == "task_checked"]
        assert checked["task_sha256"] == hashlib.sha256(CODE.encode()).hexdigest()
        jumped = [line for line in events(output / name) if line["event"] == JUMPED]
        assert jumped
        assert all(float(line["norm"]) >= ALARM * float(line["median"]) for line in jumped)
    assert any(WHY.encode() in data for data in tap.heard), "the search finds what is said"
    told = [json.loads(data) for data in tap.heard if b'"what": "' + JUMPED.encode() in data]
    assert {(notice["role"], *notice["details"]) for notice in told} == {("coordinator", "version")}
    assert statuses[COORDINATOR][JUMPED]["version"] >= told[0]["details"]["version"]
    assert not any(RECORD.encode() in data for data in tap.read())
    assert RECORD not in json.dumps(statuses)
    quoting = {path for path in output.rglob("*") if path.is_file() and RECORD.encode() in path.read_bytes()}
    assert quoting == {output / name / "daemon.log" for name in ("site-a", "site-b")}


def events(folder: Path) -> list[dict[str, str]]:
    return list(map(json.loads, (folder / "daemon.log").read_text().splitlines()))
