import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednats import Examples, Task
from fednats.config import ServerSettings, TrainingSettings
from fednats.errors import ConfigError, LocalDataError
from fednats.learning.baseline import PooledTask, train_alone
from fednats.learning.evaluation import evaluate
from fednats.learning.flat import initial_vector, parameters_of, read_vector, write_vector
from fednats.learning.server_optimizer import OPTIMIZERS, ServerOptimizer

torch.set_num_threads(1)
Vector = NDArray[np.float32]
SERVERS = [
    ServerSettings(),
    ServerSettings(learning_rate=0.5, momentum=0.9),
    ServerSettings(optimizer="adam", learning_rate=0.1),
]


class Quadrants(Task):
    """Whether x and y have the same sign; one hospital sees only the given side of x."""

    def __init__(self, side: int = 0, n: int = 200) -> None:
        self._side, self._n = side, n

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(2, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

    def train_data(self) -> Examples:
        return self._points(1)

    def test_data(self) -> Examples:
        return self._points(2)

    def _points(self, seed: int) -> Examples:
        points = torch.randn(self._n, 2, generator=torch.Generator().manual_seed(seed))
        if self._side:
            points[:, 0] = self._side * points[:, 0].abs()
        return TensorDataset(points, (points.prod(1) > 0).long())


def deltas(n: int) -> list[Vector]:
    rng = np.random.default_rng(3)
    return [rng.standard_normal(7).astype(np.float32) for _ in range(n)]


def test_vector_holds_parameters_and_running_statistics_in_state_dict_order() -> None:
    model = Quadrants().model()
    assert [parameter.name for parameter in parameters_of(model)] == [
        *("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var.log", "3.weight", "3.bias"),
    ]
    size = sum(math.prod(parameter.shape) for parameter in parameters_of(model))
    assert read_vector(model).shape == (size,)
    assert read_vector(model).dtype == np.float32


def test_write_then_read_gives_the_vector_back_and_leaves_integer_buffers() -> None:
    model = Quadrants().model()
    model(torch.ones(4, 2))
    vector = np.arange(read_vector(model).size, dtype=np.float32) / np.float32(16)
    write_vector(model, vector)
    np.testing.assert_allclose(read_vector(model), vector, rtol=1e-6)
    assert model.state_dict()["1.num_batches_tracked"] == 1
    assert model.state_dict()["0.weight"][1, 1] == 3 / 16


def test_written_vector_is_not_shared_with_the_model() -> None:
    model, vector = nn.Linear(1, 1), np.ones(2, np.float32)
    write_vector(model, vector)
    vector[:] = 5
    np.testing.assert_array_equal(read_vector(model), [1, 1])


def test_vector_of_another_model_is_refused() -> None:
    with pytest.raises(LocalDataError, match=r"3 values for a model of 2"):
        write_vector(nn.Linear(1, 1), np.ones(3, np.float32))


def test_initial_weights_depend_on_the_seed_alone() -> None:
    first = initial_vector(Quadrants(), 1)
    torch.manual_seed(99)
    np.testing.assert_array_equal(initial_vector(Quadrants(), 1), first)
    assert not np.array_equal(initial_vector(Quadrants(), 2), first)


def test_initial_weights_leave_torch_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    initial_vector(Quadrants(), 1)
    assert torch.rand(1) == expected


def stepped(settings: ServerSettings, weights: Vector, deltas: Iterable[Vector]) -> Vector:
    optimizer = ServerOptimizer(settings)
    slots = {name: np.zeros_like(weights) for name in optimizer.slots}
    for n_steps, delta in enumerate(deltas):
        weights, slots = optimizer.step(weights, slots, delta, n_steps)
    return weights


def test_plain_server_step_is_exactly_weights_plus_delta() -> None:
    weights, delta = deltas(2)
    np.testing.assert_array_equal(stepped(ServerSettings(), weights, [delta]), weights + delta)


def test_server_momentum_carries_the_last_delta_on() -> None:
    after = stepped(
        ServerSettings(momentum=0.5), np.zeros(1, np.float32), [np.ones(1, np.float32), np.zeros(1, np.float32)]
    )
    np.testing.assert_allclose(after, [1.5])


def test_server_adam_takes_the_papers_first_step() -> None:
    delta = np.array([0.001, -1.0], np.float32)
    after = stepped(ServerSettings(optimizer="adam", learning_rate=0.1), np.zeros(2, np.float32), [delta])
    np.testing.assert_allclose(after, 0.1 * delta / (np.abs(delta) + 1e-3), rtol=1e-5)


@pytest.mark.parametrize("settings", SERVERS, ids=lambda s: f"{s.optimizer}-{s.momentum}")
def test_the_server_steps_as_torchs_own_optimizer_over_many_steps(settings: ServerSettings) -> None:
    weights = torch.nn.Parameter(torch.zeros(7))
    whole = OPTIMIZERS[settings.optimizer](weights, settings, settings.rate(synchronous=True))
    for delta in deltas(5):
        weights.grad = -torch.tensor(delta)
        whole.step()
    np.testing.assert_array_equal(stepped(settings, np.zeros(7, np.float32), deltas(5)), weights.detach().numpy())


@pytest.mark.parametrize("settings", SERVERS, ids=lambda s: f"{s.optimizer}-{s.momentum}")
def test_stepping_block_by_block_is_stepping_the_whole(settings: ServerSettings) -> None:
    zeros = np.zeros(7, np.float32)
    blocks = [
        stepped(settings, zeros[part], [delta[part] for delta in deltas(5)]) for part in (slice(0, 3), slice(3, 7))
    ]
    np.testing.assert_array_equal(np.concatenate(blocks), stepped(settings, zeros, deltas(5)))


@pytest.mark.parametrize("delta", [np.ones(1, np.float32), np.array([1, np.nan], np.float32)])
def test_server_refuses_a_bad_delta_and_leaves_the_weights(delta: Vector) -> None:
    weights = np.zeros(2, np.float32)
    with pytest.raises(ValueError, match="mean delta"):
        ServerOptimizer(ServerSettings()).step(weights, {}, delta, 0)
    np.testing.assert_array_equal(weights, [0, 0])


def test_pooled_hospitals_beat_the_best_one_alone_on_everybodys_cases() -> None:
    tasks = [Quadrants(-1), Quadrants(1)]
    everybody = PooledTask(tasks)
    settings = TrainingSettings(local_steps=1, learning_rate=0.05)
    alone = [evaluate(everybody, train_alone(task, settings, 150, seed=0)).metrics["accuracy"] for task in tasks]
    pooled = evaluate(everybody, train_alone(everybody, settings, 150, seed=0))
    assert pooled.n_samples == 400
    assert max(alone) < 0.75
    assert pooled.metrics["accuracy"] > 0.9


def test_metrics_of_known_scores() -> None:
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [0.0, 2.0]])
    found = Quadrants().metrics(scores, torch.tensor([0, 0, 1, 1]))
    assert found == {"accuracy": 0.75, "auc": 1.0}


def test_auc_of_three_classes_and_none_where_a_class_is_absent() -> None:
    scores = torch.eye(3).repeat(2, 1)
    assert Quadrants().metrics(scores, torch.tensor([0, 1, 2, 0, 1, 2])) == {"accuracy": 1.0, "auc": 1.0}
    assert Quadrants().metrics(scores, torch.tensor([0, 1, 1, 0, 1, 1])).keys() == {"accuracy"}


def test_a_metric_that_is_not_finite_is_left_out_and_still_known_by_name() -> None:
    class Undefined(Quadrants):
        def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
            return {"c_index": float("nan"), "n": float(len(scores) + len(targets))}

    found = evaluate(Undefined(), initial_vector(Undefined(), 0))
    assert found.metrics == {"n": 400.0}
    assert found.figures == ("c_index", "n")


def test_hospital_without_a_test_case_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Quadrants: test_data\(\) is empty"):
        evaluate(Quadrants(n=0), initial_vector(Quadrants(), 0))
