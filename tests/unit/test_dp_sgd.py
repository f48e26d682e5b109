from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednats import Examples, Task
from fednats.config import RecordPrivacySettings, TrainingSettings
from fednats.errors import ConfigError, LocalDataError, TaskError
from fednats.learning.evaluation import Evaluator
from fednats.learning.flat import initial_model, initial_vector, read_vector
from fednats.learning.tasks.ct_nodule import CTNodule
from fednats.learning.trainer import Trainer, train
from fednats.privacy.randomness import Randomness
from fednats.privacy.trainer import PrivateTrainer

torch.set_num_threads(1)


class Plane(Task):
    """y = 3 a - b by least squares; the last case of ``odd`` is far from all others."""

    def __init__(self, n: int = 40, *, odd: float | None = None, layers: Callable[[], nn.Module] | None = None) -> None:
        self._n, self._odd, self._layers = n, odd, layers

    def model(self) -> nn.Module:
        return nn.Linear(2, 1) if self._layers is None else self._layers()

    def train_data(self) -> Examples:
        x = torch.randn(self._n, 2, generator=torch.Generator().manual_seed(1))
        y = 3 * x[:, :1] - x[:, 1:]
        if self._odd is not None:
            x, y = torch.cat([x, torch.full((1, 2), self._odd)]), torch.cat([y, torch.zeros(1, 1)])
        return TensorDataset(x, y)

    def test_data(self) -> Examples:
        return self.train_data()

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(inputs), targets)

    def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        return {"fit": -float(nn.functional.mse_loss(scores, targets))}


def settings(*, steps: int = 1, batch_size: int = 1000, rate: float = 0.1, **dp: float) -> TrainingSettings:
    """Whole batches and one step of plain SGD, unless asked otherwise."""
    return TrainingSettings(
        local_steps=steps,
        batch_size=batch_size,
        learning_rate=rate,
        momentum=0.0,
        dp=RecordPrivacySettings.model_validate({"noise_multiplier": 0.0, **dp}),
    )


def delta(
    task: Task, of: TrainingSettings, *, seed: int = 0, randomness: Randomness | None = None
) -> NDArray[np.float32]:
    model = initial_model(task, 0)
    start = initial_vector(task, 0)
    PrivateTrainer(task, model, randomness).train(start, of, seed)
    return read_vector(model) - start


def repeatable(seed: int = 0) -> Randomness:
    rng = np.random.default_rng(seed)
    return Randomness(rng.bytes)


def clipped_step(task: Task, max_grad_norm: float, rate: float) -> NDArray[np.float64]:
    """One step on all cases, each case's gradient by a backward pass of its own."""
    model = initial_model(task, 0)
    inputs, targets = task.train_data()[:]
    total = np.zeros(len(initial_vector(task, 0)))
    for x, y in zip(inputs, targets, strict=True):
        model.zero_grad()
        task.loss(model, x[None], y[None]).backward()  # type: ignore[no-untyped-call]
        parts = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        gradient = torch.cat(parts).double().numpy()
        total += gradient * min(1.0, max_grad_norm / np.linalg.norm(gradient))
    return -rate * total / len(inputs)


def test_without_noise_a_step_is_the_mean_of_the_clipped_gradients() -> None:
    clipped = delta(Plane(), settings(max_grad_norm=0.5))
    np.testing.assert_allclose(clipped, clipped_step(Plane(), 0.5, 0.1), rtol=1e-4, atol=1e-6)
    assert not np.allclose(clipped, clipped_step(Plane(), 1e9, 0.1), rtol=0.05)


def test_without_noise_and_clipping_it_is_plain_sgd() -> None:
    private = delta(Plane(), settings(max_grad_norm=1e6))
    model, start = initial_model(Plane(), 0), initial_vector(Plane(), 0)
    Trainer(Plane(), model).train(start, settings().model_copy(update={"dp": None}), seed=0)
    np.testing.assert_allclose(private, read_vector(model) - start, rtol=1e-4)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_the_physical_batch_size_changes_memory_and_nothing_else(size: int) -> None:
    whole = delta(Plane(), settings(steps=3, max_grad_norm=0.5))
    parts = delta(Plane(), settings(steps=3, max_grad_norm=0.5, physical_batch_size=size))
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-6)


def test_at_most_so_many_cases_go_through_the_model_at_once() -> None:
    seen: list[int] = []

    class Watched(Plane):
        def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            if model.training:
                seen.append(len(inputs))
            return super().loss(model, inputs, targets)

    delta(Watched(), settings(physical_batch_size=7))
    assert max(seen) == 7
    assert sum(seen) == 40


@pytest.mark.parametrize("odd", [1.0, 1e3, 1e6])
def test_one_record_moves_a_step_by_no_more_than_the_clipping_norm(odd: float) -> None:
    without = 40 * delta(Plane(), settings(rate=1.0, max_grad_norm=0.5)).astype(float)
    with_it = 41 * delta(Plane(odd=odd), settings(rate=1.0, max_grad_norm=0.5)).astype(float)
    moved = np.linalg.norm(with_it - without)
    assert moved <= 0.5 * (1 + 1e-3)
    if odd > 1:
        assert moved > 0.49


def test_the_noise_is_there_and_as_large_as_it_is_accounted() -> None:
    wide = Plane(layers=lambda: nn.Sequential(nn.Linear(2, 2000), nn.ReLU(), nn.Linear(2000, 1)))
    of = settings(rate=1.0, noise_multiplier=200.0, max_grad_norm=0.5)
    noisy = delta(wide, of)
    assert noisy.std() == pytest.approx(200.0 * 0.5 / 40, rel=0.05)
    assert abs(noisy.mean()) < 0.2  # seven deviations


def test_noise_sampling_and_dropout_do_not_follow_from_the_run_s_seed() -> None:
    noisy = settings(noise_multiplier=1.0)
    sampled = settings(steps=2, batch_size=10)
    dropped = settings()
    dropout = Plane(layers=lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1)))
    for task, of in ((Plane(), noisy), (Plane(), sampled), (dropout, dropped)):
        assert not np.array_equal(delta(task, of, seed=1), delta(task, of, seed=1))
        once, again = (delta(task, of, seed=seed, randomness=repeatable()) for seed in (1, 2))
        np.testing.assert_array_equal(once, again)  # nothing else is random in it, the seed least of all


def test_batches_are_drawn_by_poisson_sampling() -> None:
    sizes: list[int] = []

    class Watched(Plane):
        def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            if model.training:
                sizes.append(len(inputs))
            return super().loss(model, inputs, targets)

    delta(Watched(), settings(steps=400, batch_size=10, rate=1e-6, physical_batch_size=1000))
    assert np.mean(sizes) == pytest.approx(10, rel=0.1)
    assert np.var(sizes) == pytest.approx(40 * 0.25 * 0.75, rel=0.3)


def test_an_empty_batch_is_a_step_of_noise() -> None:
    nobody = Randomness(lambda n: b"\xff" * n)  # the largest of all values: no case is drawn
    still = delta(Plane(), settings(steps=3, batch_size=1), randomness=nobody)
    assert not still.any()

    def entropy() -> Iterator[bytes]:
        rng = np.random.default_rng(0)
        yield b"\0" * 8  # torch's seed
        yield b"\xff" * 320  # the only draw of cases
        while True:
            yield rng.bytes(8 * 4 * 2)

    source = entropy()
    moved = delta(
        Plane(),
        settings(batch_size=1, noise_multiplier=1.0),
        randomness=Randomness(lambda n: next(source)[:n].ljust(n, b"\1")),
    )
    assert moved.any()


def tied() -> nn.Module:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(2, 1))


def frozen_backbone() -> nn.Module:
    """A backbone with batch norm, whose statistics are no longer gathered."""
    backbone = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4)).requires_grad_(requires_grad=False)
    return nn.Sequential(backbone, nn.Linear(4, 1))


@pytest.mark.parametrize("layers", [tied, frozen_backbone])
def test_tied_weights_and_a_frozen_backbone_take_the_steps_of_sgd(layers: Callable[[], nn.Module]) -> None:
    task = Plane(layers=layers)
    private = settings(steps=3, max_grad_norm=1e6)
    expected = train(task, initial_vector(task, 0), private.model_copy(update={"dp": None}), seed=0)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(delta(task, private), expected, atol=1e-5)


def folded() -> nn.Module:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1)

        def forward(self, inputs: Tensor) -> Tensor:
            halves: Tensor = self.layer(inputs.reshape(-1, 1))
            return halves.reshape(-1, 2).sum(1, keepdim=True)

    return Folded()


class Counting(nn.Module):
    """Keeps a running mean of what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.seen += inputs.detach().mean()
        out: Tensor = self.layer(inputs)
        return out


class OwnNorm(nn.BatchNorm1d):
    """A subclass is one, too."""


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (
            lambda: nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)),
            r"1 \(BatchNorm1d\): use nn.GroupNorm",
        ),
        (lambda: nn.Sequential(nn.BatchNorm1d(2, affine=False), nn.Linear(2, 1)), r"0 \(BatchNorm1d\)"),
        (lambda: nn.Sequential(OwnNorm(2), nn.Linear(2, 1)), r"0 \(OwnNorm\): use nn.GroupNorm"),
        (lambda: nn.Sequential(nn.Linear(2, 1), nn.MultiheadAttention(4, 2)), "opacus.layers.DPMultiheadAttention"),
        (folded, "no gradient for each of .* cases"),
        (Counting, "training changed .*the frozen tensor seen differs"),
    ],
)
def test_a_model_in_which_records_mix_is_refused(layers: Callable[[], nn.Module], expected: str) -> None:
    with pytest.raises(TaskError, match=expected):
        delta(Plane(layers=layers), settings(noise_multiplier=1.0))


@pytest.mark.parametrize("reduction", ["sum", "weighted"])
def test_a_loss_that_is_no_mean_of_the_cases_is_refused(reduction: str) -> None:
    class Mixed(Plane):
        def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            losses = nn.functional.mse_loss(model(inputs), targets, reduction="none")
            if reduction == "sum":
                return losses.sum()
            weights = 1 + (targets > 0)
            return (losses * weights).sum() / weights.sum()

    with pytest.raises(TaskError, match="the mean of their own losses"):
        delta(Mixed(), settings(noise_multiplier=1.0))


def test_a_convolutional_model_trains_and_its_model_is_left_without_hooks() -> None:
    task = CTNodule(synthetic="screening", n_train=64, n_test=32)
    model, start = initial_model(task, 0), initial_vector(task, 0)
    of = TrainingSettings(
        local_steps=4,
        batch_size=16,
        optimizer="adam",
        learning_rate=0.002,
        dp=RecordPrivacySettings(noise_multiplier=1.0, physical_batch_size=8),
    )
    passed = PrivateTrainer(task, model).train(start, of, seed=0)
    assert passed.n_samples == 64
    assert 0 < passed.train_loss < 5
    trained = read_vector(model)
    assert np.linalg.norm(trained - start) > 0.1
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert not any(hasattr(parameter, "grad_sample") for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert "auc" in Evaluator(task, model).evaluate(trained).metrics


def test_other_runs_train_as_ever() -> None:
    of = TrainingSettings(local_steps=5, batch_size=8)
    model, start = initial_model(Plane(), 0), initial_vector(Plane(), 0)
    PrivateTrainer(Plane(), model).train(start, of, seed=3)
    private = read_vector(model)
    Trainer(Plane(), model).train(start, of, seed=3)
    np.testing.assert_array_equal(read_vector(model), private)


def test_a_trainer_without_noise_does_not_take_such_settings() -> None:
    with pytest.raises(ConfigError, match="adds no noise"):
        Trainer(Plane(), initial_model(Plane(), 0)).train(initial_vector(Plane(), 0), settings(), seed=0)


def test_a_pass_that_diverged_leaves_nothing_to_the_next_one() -> None:
    model, start = initial_model(Plane(), 0), initial_vector(Plane(), 0)
    trainer = PrivateTrainer(Plane(), model)
    with pytest.raises(LocalDataError, match="loss is"):
        trainer.train(start, settings(steps=5, rate=1e30, max_grad_norm=1e9), seed=0)
    trainer.train(start, settings(max_grad_norm=0.5), seed=0)
    np.testing.assert_allclose(read_vector(model) - start, clipped_step(Plane(), 0.5, 0.1), rtol=1e-4, atol=1e-6)
