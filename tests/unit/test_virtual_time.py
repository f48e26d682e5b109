"""Questions to whole federations in virtual time: is the slow hospital heard, does every update count once?"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.utils.data import TensorDataset

from fednats import Examples, Task
from fednats.config import (
    DeltaSettings,
    RunSettings,
    StalenessSettings,
    StopSettings,
    TrainingSettings,
)
from fednats.errors import Reason
from fednats.learning.baseline import PooledTask
from fednats.learning.evaluation import evaluate
from fednats.learning.flat import initial_vector, parameters_of, read_vector, write_vector
from fednats.learning.tasks.breast_cancer import BreastCancer
from fednats.learning.trainer import Trainer
from fednats.messages import ParameterSpec
from fednats.testbed.virtual_time import VirtualFederation, VirtualSite
from fednats.testbed.virtual_world import Weights

RARE = 1
"""The digit that only the slow hospital has."""

SLOW_S = 10.0
DELAY_S = 0.15
ROUNDS = 10
"""Passes of the slow hospital: as many as synchronous rounds fit in the time."""

TRAINING = TrainingSettings(local_steps=5, batch_size=32, learning_rate=1.0, momentum=0.0)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that threads only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


class Digits(Task):
    """Handwritten digits, 8 x 8 pixels, as scikit-learn ships them; multinomial logistic regression."""

    def __init__(self, rows: Sequence[int]) -> None:
        images, labels = load_digits(return_X_y=True)
        self.inputs = torch.from_numpy((images[rows] / 16).astype(np.float32))
        self.labels = torch.from_numpy(labels[rows].astype(np.int64))

    def model(self) -> nn.Module:
        return nn.Linear(64, 10)

    def train_data(self) -> Examples:
        return TensorDataset(self.inputs, self.labels)

    def test_data(self) -> Examples:
        return self.train_data()


class Hospital:
    """Trains on its own cases."""

    def __init__(self, task: Task, training: TrainingSettings = TRAINING) -> None:
        self._training = training
        self._model = task.model()
        self._trainer = Trainer(task, self._model)
        self.n_samples = self._trainer.n_samples

    def learn(self, weights: Weights, seed: int) -> Weights:
        self._trainer.train(weights, self._training, seed)
        return read_vector(self._model) - weights


@dataclass
class Shifting:
    """Moves a tiny model a little; no training."""

    n_samples: int

    def learn(self, weights: Weights, seed: int) -> Weights:
        rng = np.random.default_rng(seed)
        return rng.normal(scale=0.01, size=weights.size).astype(np.float32)


def shared_digits(seed: int, n_hospitals: int = 5) -> tuple[list[Digits], Digits]:
    """Share the digits out evenly, but the first hospital has all of the rare one; return the test digits too."""
    labels = load_digits(return_X_y=True)[1]
    rng = np.random.default_rng(seed)
    is_test = rng.random(len(labels)) < 0.4
    rows: list[list[int]] = [[] for _ in range(n_hospitals)]
    for label in range(10):
        own = rng.permutation(np.flatnonzero((labels == label) & ~is_test))
        parts = [own] if label == RARE else np.array_split(own, n_hospitals)
        for share, part in zip(rows, parts, strict=False):
            share.extend(part)
    return [Digits(share) for share in rows], Digits(np.flatnonzero(is_test).tolist())


def federation(seed: int, hospitals: Sequence[Digits], **aggregation: object) -> VirtualFederation:
    sites = {
        f"hospital-{number}": VirtualSite(
            region="north" if number < 3 else "south",
            learner=Hospital(task),
            train_s=1.0 + 0.03 * number if number else SLOW_S,
            delay_s=0.05,
        )
        for number, task in enumerate(hospitals)
    }
    settings = run_settings(seed=seed, training=TRAINING, aggregation=aggregation)
    first = hospitals[0]
    return VirtualFederation(settings, sites, parameters_of(first.model()), initial_vector(first, seed), DELAY_S)


def run_settings(**settings: object) -> RunSettings:
    fixed = {
        "name": "r",
        "delta": DeltaSettings(cipher="none"),
        "stop": StopSettings(max_versions=100_000),
        "server": {"learning_rate": 1.0},
    }
    return RunSettings.model_validate({**fixed, **settings})


def auc_of_the_rare(weights: Weights, test: Digits) -> float:
    model = test.model()
    write_vector(model, weights)
    with torch.inference_mode():
        scores = model(test.inputs).softmax(1)[:, RARE]
    return float(roc_auc_score(test.labels == RARE, scores))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_class_that_only_a_slow_hospital_has_is_learned_as_in_synchronous_rounds(seed: int) -> None:
    hospitals, test = shared_digits(seed)
    modes: Mapping[str, Mapping[str, object]] = {
        "sync": {"goal": "all", "region_goal": "all"},
        "corrected": {},
        "uncorrected": {"participation_correction": False},
    }
    auc = {}
    for mode, aggregation in modes.items():
        one = federation(seed, hospitals, **aggregation)
        auc[mode] = auc_of_the_rare(one.run(ROUNDS * (SLOW_S + 4 * DELAY_S)), test)
        assert one.refused == []  # however many versions are made meanwhile, the slow one is taken
        assert len(one.versions) > (ROUNDS if mode == "sync" else 15 * ROUNDS)
    assert auc["corrected"] >= auc["sync"] - 0.02
    assert auc["uncorrected"] < auc["sync"] - 0.02


def test_the_same_seed_is_the_same_run() -> None:
    hospitals, _ = shared_digits(0)
    one, other = (federation(0, hospitals) for _ in range(2))
    assert one.run(15.0).tobytes() == other.run(15.0).tobytes()
    assert [version.at_s for version in one.versions] == [version.at_s for version in other.versions]
    assert one.run(0.0).tobytes() != federation(1, hospitals).run(15.0).tobytes()


@pytest.mark.parametrize(("aggregation", "rate"), [({}, 0.3), ({"goal": "all", "region_goal": "all"}, 1.0)])
def test_the_server_s_learning_rate_follows_the_mode(aggregation: Mapping[str, object], rate: float) -> None:
    def run(server: Mapping[str, object]) -> bytes:
        sites = {f"s{number}": VirtualSite("north", Shifting(10), 1.0) for number in range(3)}
        settings = run_settings(server=server, aggregation=aggregation)
        parameters = [ParameterSpec(name="weight", shape=(8,))]
        return VirtualFederation(settings, sites, parameters, np.zeros(8, np.float32)).run(3.5).tobytes()

    assert run({}) == run({"learning_rate": rate}) != run({"learning_rate": 0.5})


def many(n_sites: int, n_regions: int, **aggregation: object) -> VirtualFederation:
    rng = np.random.default_rng(0)
    sites = {
        f"s{number}": VirtualSite(
            region=f"r{number % n_regions}",
            learner=Shifting(n_samples=int(rng.integers(20, 2000))),
            train_s=float(rng.lognormal(sigma=0.5)),
            delay_s=0.02,
        )
        for number in range(n_sites)
    }
    parameters = [ParameterSpec(name="weight", shape=(8,))]
    settings = run_settings(aggregation={"goal": 20, **aggregation})
    return VirtualFederation(settings, sites, parameters, np.zeros(8, np.float32), DELAY_S)


def test_a_thousand_sites_run_in_seconds_and_every_update_counts_once() -> None:
    federation = many(1200, 24)
    federation.run(3.0)
    counted = federation.counted()
    assert len(counted) > 2000
    assert max(counted.values()) == 1
    assert federation.refused == []
    assert len({identity.rpartition("-")[0] for identity in counted}) > 1100


def test_what_is_too_old_is_refused_and_never_counted() -> None:
    federation = many(60, 3, goal=2, staleness=StalenessSettings(max_staleness=20))
    federation.run(5.0)
    refused = {refusal.contribution_id for refusal in federation.refused}
    assert refused
    assert {refusal.reason for refusal in federation.refused} == {Reason.TOO_STALE}
    counted = federation.counted()
    assert max(counted.values()) == 1
    assert not refused & counted.keys()


def test_virtual_time_adds_plain_integers_only() -> None:
    settings = run_settings(delta=DeltaSettings())
    with pytest.raises(ValueError, match="cipher is 'bfv'"):
        VirtualFederation(settings, {}, [], np.zeros(0, np.float32))


def test_server_adam_trains_with_the_rate_that_it_has_by_default() -> None:
    """With 0.3, which suits SGD, these versions have accuracy 0.90 to 0.91."""
    tasks = [BreastCancer(**options) for options in BreastCancer.sites(5, 2).values()]
    training = BreastCancer.recommended.training
    sites = {
        f"hospital-{number}": VirtualSite("north" if number < 3 else "south", Hospital(task, training), 1.0 + number)
        for number, task in enumerate(tasks)
    }
    settings = run_settings(seed=2, training=training, server={"optimizer": "adam"})
    together = VirtualFederation(settings, sites, parameters_of(tasks[0].model()), initial_vector(tasks[0], 2), DELAY_S)
    together.run(60.0)
    accuracies = [
        evaluate(PooledTask(tasks), version.weights).metrics["accuracy"] for version in together.versions[-5:]
    ]
    assert min(accuracies) > 0.95
