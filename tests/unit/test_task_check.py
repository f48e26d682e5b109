"""``fednats check``: what it says of a task, and that it leaves nothing behind."""

import hashlib
from pathlib import Path

import pytest
import tomli_w
from typer.testing import CliRunner, Result

from fednats.cli import app
from fednats.errors import TaskError
from fednats.learning.describe import describe
from fednats.services.site.worker import SiteWorker
from tests.unit.test_privacy_account import site

CODE = """
import torch
from torch import nn
from fednats import Task

class Patients(torch.utils.data.TensorDataset):
    patients = ["p1", "p2", "p3", "p3"]
    n_missing = {"age": 2}

class Own(Task):
    def __init__(self, fault=""):
        self.fault = fault

    def model(self):
        net = nn.Sequential(nn.Linear(3, 2))
        if self.fault == "unused":
            net.extra = nn.Linear(1, 1)
            net.forward = lambda x: net[0](x)
        return net

    def train_data(self):
        x = torch.arange(12.0).reshape(4, 3)
        if self.fault == "missing":
            x[1, 1] = torch.nan
        return Patients(x, torch.tensor([0, 1, 1, 1]))

    def test_data(self):
        found = Patients(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
        found.patients = ["p3", "p4", "p5", "p6"]
        return found

    def loss(self, model, inputs, targets):
        if self.fault == "loss":
            raise ValueError("patient Ada Lovelace has no value")
        return super().loss(model, inputs, targets)
"""


@pytest.fixture
def own_task(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(CODE)
    return f"{tmp_path / 'own.py'}:Own"


def check(*arguments: str, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["check", *arguments])
    assert done.exit_code == code, done.output
    return done


def test_it_says_what_a_task_s_data_and_model_are(own_task: str) -> None:
    printed = check(own_task, "--dp").stdout
    for text in (
        f"SHA-256 {hashlib.sha256(CODE.encode()).hexdigest()}",
        "8 parameters; 8 values travel",
        "4 cases: inputs float32[3], target int64[]",
        "cases by target: 0: 1, 1: 3",
        "3 patients",
        "missing values: age 2",
        "warning  1 patients are in the training data and in the test data",
        "s per step",
        "classification: scores float32[n, 2], targets int64[n]",
        "one batch works",
        "cipher bfv",
        "peak memory",
        "The check passed; nothing was sent.",
    ):
        assert text in printed
    assert "Ada" not in printed


def test_the_hash_that_is_printed_is_the_one_that_the_policy_lists(own_task: str, tmp_path: Path) -> None:
    def hashed(path: str) -> str:
        return CliRunner().invoke(app, ["task", "hash", path], catch_exceptions=False).stdout

    code = own_task.rpartition(":")[0]
    digest = hashlib.sha256(CODE.encode()).hexdigest()
    assert hashed(code) == f"{digest}  {code}\n"
    assert hashed(own_task).split()[0] == digest
    kit = tmp_path / "kit"
    kit.mkdir()
    settings = site(tmp_path, task={"path": own_task}, policy_file=Path("policy.toml"), state_dir=Path("state"))
    (kit / "site.toml").write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)))
    (tmp_path / "model.key").chmod(0o600)
    shipped = hashed("heart").split()[0]
    (kit / "policy.toml").write_text(f'task_sha256 = ["{shipped}"]')
    refused = str(check(str(kit / "site.toml"), code=1).exception)
    assert f"has SHA-256 {digest}, and task_sha256 in policy.toml allows {shipped}" in refused
    (kit / "policy.toml").write_text(f'task_sha256 = ["{digest}"]')
    assert f"SHA-256 {digest}" in check(str(kit / "site.toml")).stdout


def test_what_fails_is_shown_in_full_and_ends_the_check(own_task: str) -> None:
    done = check(own_task, "--option", "fault=loss", code=1)
    assert "FAILED training" in done.stdout
    assert "evaluation" not in done.stdout
    assert "Traceback" in done.stderr
    assert "ValueError: patient Ada Lovelace has no value" in done.stderr


def test_values_that_are_not_finite_and_parameters_that_nothing_trains_are_named(own_task: str) -> None:
    done = check(own_task, "--option", "fault=missing", code=1)
    assert "warning  1 cases have a value that is not finite" in done.stdout
    assert "is a value of the data not finite?" in done.stderr
    printed = check(own_task, "--option", "fault=unused").stdout
    assert "warning  extra.weight gets no gradient: freeze it" in printed


def test_a_federation_file_is_checked_for_each_of_its_sites(own_task: str, tmp_path: Path) -> None:
    federation = {
        "name": "ward",
        "task": own_task,
        "delta": {"cipher": "none"},
        "regions": {"north": {}},
        "sites": {"a": {"region": "north"}, "b": {"region": "north", "options": {"fault": "loss"}}},
    }
    (tmp_path / "federation.toml").write_text(tomli_w.dumps(federation))
    done = check(str(tmp_path / "federation.toml"), code=1)
    assert done.stdout.index("site a") < done.stdout.index("cipher none") < done.stdout.index("site b")
    assert "FAILED training" in done.stdout


def test_a_hospital_s_own_settings_are_checked_with_its_policy_and_nothing_is_written(
    own_task: str, tmp_path: Path
) -> None:
    kit = tmp_path / "kit"
    kit.mkdir()
    account = tmp_path / "privacy.sqlite"
    (kit / "policy.toml").write_text(f'privacy_account = "{account}"\n[budget]\nmax_epsilon = 5.0\n')
    settings = site(tmp_path, task={"path": own_task}, policy_file=Path("policy.toml"), state_dir=Path("state"))
    (kit / "site.toml").write_text(tomli_w.dumps(settings.model_dump(mode="json", exclude_none=True)))
    (tmp_path / "model.key").chmod(0o600)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}
    assert "nothing was charged" in check(str(kit / "site.toml")).stdout
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path in before} == before
    assert not account.exists()
    assert not (kit / "state").exists()


def test_a_site_tries_a_batch_before_it_takes_part(own_task: str, tmp_path: Path) -> None:
    worker = SiteWorker(site(tmp_path, task={"path": own_task, "options": {"fault": "loss"}}))
    with pytest.raises(TaskError, match="training on one batch failed: ValueError") as raised:
        worker.try_batch()
    assert "Ada" not in raised.value.public
    assert worker.prepare().n_samples == 4
    unused = SiteWorker(site(tmp_path, task={"path": own_task, "options": {"fault": "unused"}})).try_batch()
    assert unused == ("extra.weight", "extra.bias")


def test_a_large_data_set_is_looked_at_for_a_while_only() -> None:
    data = [([1.0, 2.0], 0)] * 1000
    found = describe(data, look_s=0.0)  # type: ignore[arg-type]  # any sequence of cases
    assert (found.n_cases, found.n_seen) == (1000, 1)
