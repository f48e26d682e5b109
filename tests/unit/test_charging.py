"""What a hospital's privacy account is charged for, and what it is not."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fednats.config import SiteSettings, TrainingSettings
from fednats.errors import FednatsError, LocalDataError, LocalStorageError, TaskError
from fednats.learning.flat import initial_model, initial_vector, parameters_of
from fednats.learning.task_code import make_task
from fednats.messages import Grid, ModelManifest
from fednats.privacy.account import PrivacyAccount
from fednats.privacy.guard import account_file
from fednats.privacy.policy import NO_POLICY
from fednats.services.site.worker import SiteWorker
from fednats.storage.local_model import model_folder
from fednats.storage.outbox import Outbox
from fednats.storage.tensor_file import TensorFile
from tests.unit.test_privacy_account import manifest, site

N_CASES = 60
CODE = f"""
import torch
from torch import nn
from fednats import Task

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.out(self.second(torch.relu(self.first(x))))

class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.out, self.unused = nn.Linear(4, 2), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(x)

class Own(Task):
    def __init__(self, model="plain", odd_case=-1):
        self.name, self.odd_case = model, odd_case

    def model(self):
        if self.name == "in_place":
            return nn.Sequential(nn.Linear(4, 8), nn.GroupNorm(2, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
        return {{"tied": Tied, "unused": Unused, "plain": lambda: nn.Linear(4, 2)}}[self.name]()

    def train_data(self):
        x = torch.randn({N_CASES}, 4, generator=torch.Generator().manual_seed(3))
        if self.odd_case >= 0:
            x[self.odd_case, 0] = torch.nan
        return torch.utils.data.TensorDataset(x, (x[:, 1] > 0).long())

    def test_data(self):
        return self.train_data()

    def loss(self, model, inputs, targets):
        if inputs.isnan().any():
            raise ValueError("a value is missing")
        return super().loss(model, inputs, targets)
"""

Make = Callable[..., tuple[SiteWorker, SiteSettings, ModelManifest]]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a worker that holds version 0 of an own task, its settings, and the manifest of a run with DP-SGD."""

    def made(*, batch_size: int = 4, learning_rate: float = 0.05, **options: object) -> tuple:  # type: ignore[type-arg]
        (tmp_path / "own.py").write_text(CODE)
        settings = site(tmp_path, task={"path": f"{tmp_path}/own.py:Own", "options": options})
        task = make_task(settings.task.path, options)
        parameters = parameters_of(initial_model(task, 0))
        folder = model_folder(settings.state_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with TensorFile.create(folder / "version-0.safetensors", [(s.name, s.shape) for s in parameters], {}) as file:
            file.write(0, initial_vector(task, 0))
        training = {"local_steps": 3, "batch_size": batch_size, "learning_rate": learning_rate}
        run = manifest().model_copy(
            update={
                "parameters": parameters,
                "grid": Grid(grid_id="g", steps=(2.0**-8,) * len(parameters)),
                "training": TrainingSettings.model_validate({**training, "dp": {"noise_multiplier": 4.0}}),
            }
        )
        return SiteWorker(settings), settings, run

    return made


def n_charged(settings: SiteSettings) -> int:
    file = account_file(settings, NO_POLICY)
    return PrivacyAccount(file).n_charges("record") if file.exists() else 0


def attempt(worker: SiteWorker, run: ModelManifest) -> None:
    worker.train(run, False)  # noqa: FBT003 - as the daemon calls it


@pytest.mark.parametrize("model", ["in_place", "tied"])
def test_usual_models_train_with_noise_and_each_pass_is_charged_once(make: Make, model: str) -> None:
    worker, settings, run = make(model=model)
    for _ in range(2):
        attempt(worker, run)
        worker.encode(run)
    assert n_charged(settings) == 2


def test_layers_that_overwrite_their_input_are_as_they_were_after_training_with_noise(make: Make) -> None:
    worker, _, run = make(model="in_place")
    attempt(worker, run)
    assert getattr(worker._trainer._model.get_submodule("2"), "inplace", None) is True


def test_a_branch_that_is_not_used_is_refused_by_name_and_charged_nothing(make: Make) -> None:
    worker, settings, run = make(model="unused")
    for _ in range(3):
        with pytest.raises(TaskError, match=r"unused\.weight"):
            attempt(worker, run)
    assert n_charged(settings) == 0


def test_a_case_that_fails_costs_one_pass_at_most(make: Make) -> None:
    """It is in none of the batches that are tried first; from the first failure on every case is tried before a charge."""
    worker, settings, run = make(odd_case=N_CASES - 1, batch_size=30)
    failed = 0
    for _ in range(40):
        try:
            attempt(worker, run)
            worker.encode(run)
        except FednatsError:
            failed += 1
    assert failed >= 39  # of three batches with half of the cases each, hardly one is without it
    worker._outbox.close()
    with Outbox(settings.state_dir / "outbox.sqlite")._database.transaction() as connection:
        (n_stored,) = connection.execute("SELECT COUNT(*) FROM outgoing").fetchone()
    assert n_charged(settings) <= n_stored + 1


def test_training_that_diverges_is_charged_once_and_not_again(make: Make) -> None:
    worker, settings, run = make(learning_rate=1e38)
    for _ in range(3):
        with pytest.raises(LocalDataError, match=r"not finite|loss is"):
            attempt(worker, run)
    assert n_charged(settings) <= 1


def test_a_worker_process_that_was_killed_in_a_pass_tries_every_case_before_the_next_charge(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, settings, run = make()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(worker._trainer, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        attempt(worker, run)
    tried: list[bool] = []
    again, _, _ = make()
    rehearse = again._trainer.rehearse

    def noted(*args: Any, whole: bool) -> None:
        tried.append(whole)
        rehearse(*args, whole=whole)

    monkeypatch.setattr(again._trainer, "rehearse", noted)
    for _ in range(3):
        attempt(again, run)
        again.encode(run)
    assert tried == [True]
    assert n_charged(settings) == 4


def test_a_pass_that_does_not_fit_on_the_disk_is_encoded_again_and_not_made_or_charged_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, settings, run = make()
    noisy = run.model_copy(update={"delta": run.delta.model_validate({"cipher": "none", "dp": {"clip_norm": 0.5}})})
    attempt(worker, noisy)
    add_chunk = Outbox.add_chunk

    def full(*_: object) -> None:
        raise LocalStorageError("the disk is full")

    monkeypatch.setattr(Outbox, "add_chunk", full)
    for _ in range(3):
        with pytest.raises(LocalStorageError):
            worker.encode(noisy)
    monkeypatch.setattr(Outbox, "add_chunk", add_chunk)
    update = worker.encode(noisy)
    assert update.n_samples == N_CASES
    account = PrivacyAccount(account_file(settings, NO_POLICY))
    assert (account.n_charges("record"), account.n_charges("site")) == (1, 1)


def test_nothing_is_charged_where_the_disk_has_no_room_for_the_update(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, settings, run = make()
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(LocalStorageError, match=r"10 bytes are free, an update needs .* nothing was trained"):
        attempt(worker, run)
    assert n_charged(settings) == 0
