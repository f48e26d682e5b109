"""What a run is started with: weights from a file, settings that the kits can serve, stop rules of an extension."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import nn
from typer.testing import CliRunner

from fednats.cli import app
from fednats.config import CoordinatorSettings, DeltaSettings, Extension, RunSettings, StopSettings, parse
from fednats.crypto import sealing, secret
from fednats.delta import scheme
from fednats.errors import ConfigError, TaskError
from fednats.learning.flat import read_vector
from fednats.learning.initial_weights import load_weights
from fednats.messages import Opening
from fednats.services.coordinator.runs import extended
from fednats.services.coordinator.worker import CoordinatorWorker
from fednats.storage.checkpoints import checkpoints_folder, newest_checkpoint
from tests.makers import FIRST

NORMED = {"path": f"{Path(__file__).parents[1] / 'e2e' / 'normed'}:Normed"}
SECOND = Opening(name="second", first_version=1, opened_at=1)


def tensors(**changes: NDArray[np.generic] | None) -> dict[str, NDArray[Any]]:
    found = {"weight": np.ones((3, 2), np.float32), "bias": np.ones(3, np.float32), **changes}
    return {name: values for name, values in found.items() if values is not None}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bias": None}, "it has no bias, which is 3 in the task's model"),
        ({"weight": np.ones((2, 2), np.float32)}, "weight is 2x2 in it, 3x2 in the task's model"),
        ({"weight": np.full((3, 2), np.nan, np.float32)}, "weight has values that are not finite"),
        ({"head": np.ones(1, np.float32)}, "the task's model has no head"),
    ],
)
def test_weights_that_do_not_fit_are_refused_by_the_first_tensor(
    tmp_path: Path, changes: dict[str, Any], text: str
) -> None:
    save_file(tensors(**changes), tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=text):
        load_weights(nn.Linear(2, 3), tmp_path / "w.safetensors")


def test_weights_that_fit_are_taken_whatever_their_precision(tmp_path: Path) -> None:
    save_file(tensors(weight=np.full((3, 2), 0.5, np.float16)), tmp_path / "w.safetensors")
    model = nn.Linear(2, 3)
    load_weights(model, tmp_path / "w.safetensors")
    assert read_vector(model).tolist() == [0.5] * 6 + [1.0] * 3


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match=r"w.safetensors cannot be read .*give a safetensors file"):
        load_weights(nn.Linear(2, 3), tmp_path / "w.safetensors")


def worker(folder: Path, **changes: object) -> CoordinatorWorker:
    (folder / "model.key").write_bytes(sealing.generate())
    raw: dict[str, Any] = {
        "run": "r",
        "state_dir": folder / "state",
        "signers_file": folder / "signers.toml",
        "model_key_file": folder / "model.key",
        "regions": ["north"],
        "bus": {"url": "tls://h:1"},
        "task": {"path": "breast-cancer"},
        "settings": {"name": "r", "delta": {"cipher": "none"}},
        **changes,
    }
    (folder / "state").mkdir(exist_ok=True)
    return CoordinatorWorker(parse(raw, CoordinatorSettings, source="test"), 2**20)


def settings(name: str, **changes: object) -> RunSettings:
    return parse({"name": name, "delta": {"cipher": "none"}, **changes}, RunSettings, source="test")


def test_a_run_begins_with_the_best_of_the_one_before_and_the_file_may_be_gone_by_then(tmp_path: Path) -> None:
    working = worker(tmp_path)
    first = working.open_run(FIRST, settings("r"), None)
    assert working.keep_best(0)
    folder = checkpoints_folder(tmp_path / "state")
    wanted = settings("second", seed=5, initial_model=str(folder / "best.safetensors"), server={"optimizer": "adam"})
    digest = working.prepare_run(wanted)
    (folder / "best.safetensors").unlink()
    killed = worker(tmp_path)
    second = killed.open_run(SECOND, wanted.model_copy(update={"initial_model": None}), digest)
    assert second.weights_digest == first.weights_digest
    assert (second.version, second.opening, len(second.frames)) == (1, SECOND, 1)
    assert {grid.grid_id for grid in first.grids}.isdisjoint(grid.grid_id for grid in second.grids)
    again = worker(tmp_path).open_run(SECOND, wanted, digest)
    assert again == second, "asked for again after a restart, it is there"
    stored = newest_checkpoint(folder)
    assert stored is not None
    assert (stored.settings.server.optimizer, stored.n_steps) == ("adam", 0)


def test_another_seed_gives_another_model(tmp_path: Path) -> None:
    working = worker(tmp_path)
    first = working.open_run(FIRST, settings("r"), None)
    assert working.open_run(SECOND, settings("second", seed=5), None).weights_digest != first.weights_digest


def test_an_extension_goes_on_with_model_grid_and_optimiser(tmp_path: Path) -> None:
    adam = {"optimizer": "adam"}
    working = worker(tmp_path)
    working.open_run(FIRST, settings("r", server=adam), None)
    working.begin()
    working._mean += 0.01
    stepped = working.apply("c", [], 1.0, {}, {})
    extension = FIRST.model_copy(update={"opened_at": 2})
    opened = working.open_run(extension, settings("r", server=adam, stop={"max_versions": 9}), None)
    assert (opened.version, opened.weights_digest, opened.grids) == (2, stepped.weights_digest, stepped.grids)
    stored = newest_checkpoint(checkpoints_folder(tmp_path / "state"))
    assert stored is not None
    assert (stored.n_steps, stored.settings.stop.max_versions) == (1, 9)
    with working._checkpoints.state(2) as state:
        assert np.abs(state[len(state) * 2 // 3 : len(state)]).min() > 0, "Adam's second moment is kept"


def test_a_federation_of_two_levels_is_given_no_run_for_one(tmp_path: Path) -> None:
    working = worker(tmp_path, settings={"name": "r", "delta": {"cipher": "none", "tiers": 2}})
    with pytest.raises(ConfigError, match=r"delta.tiers is 1, the federation has 2: set it to that"):
        working.prepare_run(settings("second"))


def test_a_run_with_noise_is_not_started_for_a_model_that_cannot_be_trained_with_it(tmp_path: Path) -> None:
    working = worker(tmp_path, task=NORMED)
    working.prepare_run(settings("plain"))
    with pytest.raises(TaskError, match=r"1 \(BatchNorm1d\): use nn\.GroupNorm"):
        working.prepare_run(settings("second", training={"dp": {"noise_multiplier": 1.0}}))


def test_kits_with_keys_are_given_no_run_without_encryption(tmp_path: Path) -> None:
    (tmp_path / "epoch-1.secret").write_bytes(secret.generate(scheme.bfv(DeltaSettings()).parameters)[0])
    working = worker(tmp_path, secret_key_file=tmp_path / "epoch-1.secret", settings={"name": "r"})
    working.prepare_run(settings("second", delta={}))
    with pytest.raises(ConfigError, match=r'delta\.cipher is "none", but the kits have keys, .* leave it out'):
        working.prepare_run(settings("second"))


def test_an_extension_changes_what_it_names() -> None:
    stop = StopSettings(max_versions=40, max_wall_s=60, target=0.9)
    longer = extended(stop, Extension(versions=10), n_versions=41)
    assert longer == stop.model_copy(update={"max_versions": 51})
    other = extended(stop, Extension(versions=1, wall_s=5.0, target=0.95), n_versions=41)
    assert (other.max_versions, other.max_wall_s, other.target) == (42, 5.0, 0.95)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "--help"], "FEDERATION.toml"),
        (["run", "start", "--help"], "RUN.toml"),
        (["run", "ward.toml", "--help"], "as processes"),
        (["run", "here", "ward.toml", "--help"], "as processes"),
    ],
)
def test_run_takes_a_file_or_a_command(arguments: list[str], text: str) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert text in done.output
