"""What a task's cases may be, in training, with differential privacy, and in evaluation alike."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from fednats import Examples, Task
from fednats.config import RecordPrivacySettings, TrainingSettings
from fednats.errors import ConfigError, TaskError
from fednats.learning.baseline import PooledTask, train_alone
from fednats.learning.evaluation import evaluate
from fednats.learning.flat import initial_model, initial_vector
from fednats.learning.task_errors import task_code
from fednats.learning.trainer import Trainer, train
from fednats.privacy.trainer import PrivateTrainer

N = 33
"""Of batches of 32 the last has one case."""

SETTINGS = TrainingSettings(local_steps=3, batch_size=8, learning_rate=0.1)
FEATURES = torch.randn(N, 6, generator=torch.Generator().manual_seed(0))
LABELS = (FEATURES[:, 0] > 0).long()


class Two(nn.Module):
    """Takes an image's features and an age."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.out = nn.Linear(5, 4), nn.Linear(5, 2)

    def forward(self, image: Tensor, age: Tensor) -> Tensor:
        return self.out(torch.cat([self.image(image).relu(), age], dim=1))  # type: ignore[no-any-return]


class Squeezing(nn.Module):
    """One logit, without an axis of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x).squeeze()  # type: ignore[no-any-return]


class Listed(Dataset[tuple[Any, ...]]):
    """A list as a data set."""

    def __init__(self, cases: Sequence[Any]) -> None:
        self.cases = cases

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Any:
        return self.cases[index]


class Given(Task):
    """Trains and tests ``make()`` on ``data``."""

    def __init__(self, data: Any, make: Callable[[], nn.Module] = lambda: nn.Linear(6, 2)) -> None:
        self.data, self.make = data, make

    def model(self) -> nn.Module:
        return self.make()

    def train_data(self) -> Examples:
        return self.data  # type: ignore[no-any-return]

    def test_data(self) -> Examples:
        return self.data  # type: ignore[no-any-return]


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


TUPLES = Listed([((x[:5], x[5:]), int(y)) for x, y in zip(FEATURES, LABELS, strict=True)])
DICTS = Listed([({"age": x[5:].double(), "image": x[:5]}, y) for x, y in zip(FEATURES, LABELS, strict=True)])


@pytest.mark.parametrize(
    "task",
    [
        Given(TensorDataset(FEATURES.double(), LABELS)),
        Given(Listed([(x.numpy().astype("float64"), int(y)) for x, y in zip(FEATURES, LABELS, strict=True)])),
        Given(TensorDataset(FEATURES, LABELS[:, None])),
        Given(TensorDataset(FEATURES, LABELS.to(torch.uint8))),
        Given(TensorDataset(FEATURES, LABELS[:, None].double()), lambda: nn.Linear(6, 1)),
        Given(TensorDataset(FEATURES, LABELS), Squeezing),
        Given(TensorDataset(FEATURES, LABELS), normed),
        Given(TUPLES, Two),
        Given(DICTS, Two),
    ],
    ids=[
        "float64",
        "numpy",
        "labels [n, 1]",
        "uint8 labels",
        "float labels",
        "squeezing",
        "BatchNorm",
        "tuple",
        "dict",
    ],
)
def test_what_pytorch_collates_is_trained_on_and_evaluated(task: Given) -> None:
    weights = initial_vector(task, 0)
    assert train(task, weights, SETTINGS, seed=0).any()
    found = evaluate(task, weights, 32)
    assert found.n_samples == N
    assert set(found.metrics) >= {"auc", "accuracy"}
    pooled = PooledTask([task, task])
    assert evaluate(pooled, train_alone(pooled, SETTINGS, 3, seed=0)).n_samples == 2 * N


@pytest.mark.parametrize("data", [TUPLES, DICTS], ids=["tuple", "dict"])
def test_several_inputs_are_trained_on_with_differential_privacy(data: Listed) -> None:
    task = Given(data, Two)
    settings = SETTINGS.model_copy(update={"dp": RecordPrivacySettings()})
    assert PrivateTrainer(task, initial_model(task, 0)).train(initial_vector(task, 0), settings, 0).n_samples == N


class Endless(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            Listed([{"image": FEATURES[0], "label": 1}]),
            r"train_data\(\) gives a dict with image, label; expected \(input",
        ),
        (Listed([(FEATURES[0], FEATURES[0], 1)]), r"gives 3 parts \(Tensor, Tensor, int\); expected"),
        (Listed([(FEATURES[0], "ill")]), r"gives 2 parts \(Tensor, str\); expected"),
        (Listed([("scan.png", 1)]), r"gives 2 parts \(str, int\); expected"),
        (Listed([FEATURES[0]]), r"gives a Tensor; expected"),
        (Listed([(None, 1)]), r"cannot be put into a batch"),
        (Listed([]), r"Given: train_data\(\) is empty"),
        (Endless(), r"is a Endless without a length"),
    ],
)
def test_other_cases_are_refused_at_the_start_with_what_is_expected(data: Any, said: str) -> None:
    with pytest.raises((ConfigError, TaskError), match=said):
        Trainer(Given(data), nn.Linear(6, 2))


def test_cases_of_different_shapes_are_refused() -> None:
    task = Given(Listed([(FEATURES[0], 0), (FEATURES[0][:3], 1)]))
    with pytest.raises(TaskError, match=r"cannot be put into a batch: .*equal size"):
        train(task, initial_vector(task, 0), SETTINGS, seed=0)


def test_an_error_names_shapes_and_dtypes_of_the_batch() -> None:
    task = Given(TensorDataset(LABELS[:, None].expand(N, 6), LABELS))
    with pytest.raises(TaskError, match=r"inputs are int64\[n, 6\], its targets int64\[n\]"), task_code("training"):
        train(task, initial_vector(task, 0), SETTINGS, seed=0)
    with pytest.raises(TaskError, match=r"inputs are int64\[n, 6\]"), task_code("evaluating"):
        evaluate(task, initial_vector(task, 0))


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (lambda _loss: None, "loss\\(\\) returned NoneType, expected the mean loss"),
        (lambda loss: loss.item(), "loss\\(\\) returned float, expected"),
        (lambda loss: loss.expand(2), "loss\\(\\) returned float32\\[n\\], expected"),
        (lambda loss: loss.detach(), "does not depend on the parameters"),
    ],
    ids=["forgotten", "item", "vector", "detached"],
)
def test_a_loss_that_is_none_is_named(returned: Callable[[Tensor], Any], said: str) -> None:
    class Own(Given):
        def loss(self, model: nn.Module, inputs: Any, targets: Tensor) -> Tensor:
            return returned(super().loss(model, inputs, targets))  # type: ignore[no-any-return]

    task = Own(TensorDataset(FEATURES, LABELS))
    with pytest.raises(TaskError, match=said):
        train(task, initial_vector(task, 0), SETTINGS, seed=0)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_batch_norm_is_not_trained_on_batches_of_one(batch_size: int) -> None:
    n = 1 if batch_size > 1 else N
    task = Given(TensorDataset(FEATURES[:n], LABELS[:n]), normed)
    settings = SETTINGS.model_copy(update={"batch_size": batch_size})
    with pytest.raises(
        TaskError, match=f"1 is a BatchNorm over cases.*batch_size is {batch_size}, the site has {n} cases"
    ):
        train(task, initial_vector(task, 0), settings, seed=0)
    assert evaluate(task, initial_vector(task, 0)).n_samples == n
