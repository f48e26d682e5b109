import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednats import Examples, Task
from fednats.config import TrainingSettings
from fednats.errors import ConfigError, LocalDataError
from fednats.learning.evaluation import evaluate
from fednats.learning.flat import initial_model, initial_vector, read_vector, write_vector
from fednats.learning.tasks.breast_cancer import BreastCancer
from fednats.learning.trainer import Trainer, train

torch.set_num_threads(1)
SETTINGS = TrainingSettings(local_steps=30, batch_size=16, learning_rate=0.003)


class Line(Task):
    """y = 3x by least squares; with dropout and batch norm, which must not carry over from pass to pass."""

    def __init__(self, n: int = 50, *, dropout: float = 0.0) -> None:
        self._n, self._dropout = n, dropout

    def model(self) -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(1, momentum=None), nn.Dropout(self._dropout), nn.Linear(1, 1))

    def train_data(self) -> Examples:
        x = torch.arange(self._n).float().unsqueeze(1) / 10
        return TensorDataset(x, 3 * x)

    def test_data(self) -> Examples:
        return self.train_data()

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(inputs), targets)


@pytest.mark.parametrize(("optimizer", "rate"), [("sgd", 0.05), ("adam", 0.01), ("adamw", 0.01)])
def test_training_improves_auc(optimizer: str, rate: float) -> None:
    task = BreastCancer(number=0, seed=1)
    weights = initial_vector(task, 0)
    settings = TrainingSettings.model_validate(
        {"local_steps": 60, "batch_size": 16, "optimizer": optimizer, "learning_rate": rate}
    )
    delta = train(task, weights, settings, seed=0)
    before, after = evaluate(task, weights).metrics["auc"], evaluate(task, weights + delta).metrics["auc"]
    assert before < 0.9
    assert after > 0.95


def test_same_seed_gives_the_same_delta_and_another_seed_another() -> None:
    task = Line(dropout=0.5)
    weights = initial_vector(task, 0)
    first = train(task, weights, SETTINGS, seed=1)
    np.testing.assert_array_equal(train(task, weights, SETTINGS, seed=1), first)
    assert not np.array_equal(train(task, weights, SETTINGS, seed=2), first)


def test_a_pass_does_not_depend_on_the_passes_before_it() -> None:
    task = Line(dropout=0.5)
    weights = initial_vector(task, 0)
    model = initial_model(task, 3)
    trainer = Trainer(task, model)
    trainer.train(weights + 1, SETTINGS, seed=7)
    torch.manual_seed(123)
    trainer.train(weights, SETTINGS, seed=1)
    np.testing.assert_array_equal(read_vector(model) - weights, train(task, weights, SETTINGS, seed=1))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_training_leaves_torch_random_state_and_the_given_weights_alone() -> None:
    weights = initial_vector(Line(), 0)
    kept = weights.copy()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    train(Line(dropout=0.5), weights, SETTINGS, seed=1)
    assert torch.rand(1) == expected
    np.testing.assert_array_equal(weights, kept)


def test_delta_is_local_minus_global() -> None:
    task = Line()
    weights = initial_vector(task, 0)
    model = task.model()
    write_vector(model, weights)
    one = TrainingSettings(local_steps=1, batch_size=50, momentum=0.0, learning_rate=0.1)
    inputs, targets = task.train_data()[:]
    task.loss(model.train(), inputs, targets).backward()  # type: ignore[no-untyped-call]
    bias = model.get_submodule("2").bias
    assert isinstance(bias, Tensor)
    assert bias.grad is not None
    assert train(task, weights, one, seed=0)[-1] == pytest.approx(-0.1 * bias.grad.item(), rel=1e-4)


def test_result_counts_the_training_cases_and_averages_the_loss() -> None:
    short = TrainingSettings(local_steps=1, batch_size=500, momentum=0.0, learning_rate=1e-9)
    longer = short.model_copy(update={"local_steps": 3})
    weights = initial_vector(Line(), 0)
    trainer = Trainer(Line(), initial_model(Line(), 0))
    first = trainer.train(weights, short, seed=0)
    assert first.n_samples == 50
    assert trainer.train(weights, longer, seed=0).train_loss == pytest.approx(first.train_loss, rel=1e-3)


def test_every_case_is_seen_once_an_epoch_in_another_order() -> None:
    seen: list[float] = []

    class Watched(Line):
        def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            seen.extend(inputs.flatten().tolist())
            return super().loss(model, inputs, targets)

    train(Watched(n=20), initial_vector(Line(), 0), TrainingSettings(local_steps=4, batch_size=10), seed=0)
    assert sorted(seen[:20]) == sorted(seen[20:]) == sorted(set(seen))
    assert seen[:20] != seen[20:]


def test_diverging_training_is_refused_and_the_remedy_named() -> None:
    with pytest.raises(LocalDataError, match=r"loss is (inf|nan) at step \d+ of 30; lower the learning rate"):
        train(Line(), initial_vector(Line(), 0), TrainingSettings(local_steps=30, learning_rate=1e20), seed=0)


def test_hospital_without_cases_is_named() -> None:
    with pytest.raises(ConfigError, match=r"Line: train_data\(\) is empty"):
        Trainer(Line(n=0), initial_model(Line(), 0))
