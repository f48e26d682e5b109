"""What of a model travels, what stays as it was made, and what is refused."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednats import Examples, Task
from fednats.config import TrainingSettings
from fednats.errors import ConfigError, Reason, RefusedError, TaskError
from fednats.learning.entries import entries_of, frozen_digests, frozen_of, gathering, set_training, unlike
from fednats.learning.evaluation import Evaluator
from fednats.learning.flat import FlatModel, initial_model, parameters_of, read_vector, write_vector
from fednats.learning.initial_weights import load_weights
from fednats.learning.trainer import Trainer, train
from fednats.learning.whole_model import write_whole_model
from fednats.storage.tensor_file import TensorFile

torch.set_num_threads(1)
SETTINGS = TrainingSettings(local_steps=4, batch_size=8, learning_rate=0.05)


class Any(Task):
    """Two classes of points, learned by whatever ``make`` makes."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        self._make = make

    def model(self) -> nn.Module:
        return self._make()

    def train_data(self) -> Examples:
        points = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
        return TensorDataset(points, (points[:, 0] > 0).long())

    def test_data(self) -> Examples:
        return self.train_data()


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(requires_grad=False)


def compiled(layer: nn.Module) -> nn.Module:
    made: nn.Module = torch.compile(layer, backend="eager")  # type: ignore[assignment]  # it says it is a function
    return made


def backbone() -> nn.Module:
    return nn.Sequential(frozen(nn.Linear(4, 8)), frozen(nn.BatchNorm1d(8)), nn.ReLU(), nn.Linear(8, 2))


class Tied(nn.Module):
    """Encodes and decodes with one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.decode.weight = self.encode.weight
        self.head = nn.Linear(4, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.head(self.decode(self.encode(inputs).relu()))
        return out


class Counting(nn.Module):
    """Keeps a mean of its own, which no other site would have."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.get_buffer("mean").mul_(0.9).add_(inputs.mean(0), alpha=0.1)
        out: Tensor = self.linear(inputs)
        return out


class Caching(nn.Module):
    """Makes a tensor in its first forward, as rotary position codes are."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.turn: Tensor | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        if self.turn is None:
            self.turn = torch.linspace(0, 1, 4)
        out: Tensor = self.linear(inputs * self.turn)
        return out


def test_a_frozen_backbone_stays_and_only_what_trains_travels() -> None:
    task = Any(backbone)
    model = initial_model(task, 3)
    before = {name: tensor.clone() for name, tensor in frozen_of(model).items()}
    assert [spec.name for spec in parameters_of(model)] == ["3.weight", "3.bias"]
    assert set(before) == {
        *("0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"),
    }
    trainer, weights = Trainer(task, model), read_vector(model)
    for seed in range(3):
        trainer.train(weights, SETTINGS.model_copy(update={"weight_decay": 0.1}), seed)
    assert not np.array_equal(read_vector(model), weights)
    for name, tensor in frozen_of(model).items():
        assert torch.equal(tensor, before[name]), name


def test_a_norm_layer_that_the_model_keeps_in_eval_mode_stays_too() -> None:
    class Kept(nn.Sequential):
        def train(self, mode: bool = True) -> "Kept":  # noqa: FBT001, FBT002 - torch's signature
            super().train(mode)
            self[0].eval()
            return self

    model = Kept(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    assert [spec.name for spec in parameters_of(model)] == ["1.weight", "1.bias"]
    modes = {name: layer.training for name, layer in model.named_modules()}
    assert gathering(model) == []
    assert {name: layer.training for name, layer in model.named_modules()} == modes, "looking changes nothing"


def test_tied_weights_travel_once() -> None:
    model = Tied()
    assert [spec.name for spec in parameters_of(model)] == ["encode.weight", "head.weight", "head.bias"]
    assert frozen_of(model) == {}
    write_vector(model, np.full(16 + 8 + 2, 0.5, np.float32))
    assert model.decode.weight.eq(0.5).all()


def test_a_variance_travels_as_a_logarithm_and_no_delta_makes_it_negative() -> None:
    model = nn.BatchNorm1d(2, affine=False)
    both = nn.Sequential(model, nn.Linear(2, 1))
    assert [spec.name for spec in parameters_of(both) if spec.statistic] == ["0.running_mean", "0.running_var.log"]
    vector = read_vector(both)
    vector[2:4] -= np.array([1.0, 70.0], np.float32)
    write_vector(both, vector)
    assert model.running_var is not None
    np.testing.assert_allclose(model.running_var.numpy(), [np.exp(-1), 0.0], rtol=1e-4)


def test_the_mean_delta_of_a_variance_vanishes_near_the_hospitals_mean_whatever_one_has() -> None:
    """A feature that is constant at one hospital: a mean of logarithms would be 0.003, and eval 18 times too large."""
    model = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 1))
    flat = FlatModel(model)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_var is not None
    vector = read_vector(model)
    for _ in range(60):
        deltas = []
        for at_hospital in (0.0, 1.0):
            write_vector(model, vector)
            norm.running_var.fill_(at_hospital)
            deltas.append(flat.delta(vector)[0:4])
        vector = vector + np.float32(0.5) * np.mean(deltas, axis=0)
    write_vector(model, vector)
    assert 0.3 < float(norm.running_var) <= 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_delta_of_half_precision_is_that_of_training_alone(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).to(dtype)
    flat, start = FlatModel(model), np.random.default_rng(0).normal(size=len(FlatModel(model))).astype(np.float32)
    write_vector(model, start)
    assert np.abs(read_vector(model) - start).max() > 1e-4, "it was rounded"
    np.testing.assert_array_equal(flat.delta(start)[0 : len(flat)], 0)
    with torch.no_grad():
        model[0].get_parameter("bias").add_(1.0)
    assert np.count_nonzero(flat.delta(start)[0 : len(flat)]) == 8


def test_what_a_model_cannot_hold_is_refused_and_the_tensor_named() -> None:
    half = nn.Linear(2, 1).half()
    with pytest.raises(RefusedError, match=r"bias has a value that is not finite in float16") as refused:
        write_vector(half, np.array([0, 0, 1e5], np.float32))
    assert refused.value.reason is Reason.NOT_FINITE
    norm = nn.Sequential(nn.BatchNorm1d(1, affine=False), nn.Linear(1, 1))
    for mean, variance, expected in (
        (np.nan, 0, "running_mean"),
        (0, 85, "85, no logarithm"),
        (0, 1e4, "running_var.log"),
    ):
        with pytest.raises(RefusedError, match=expected):
            FlatModel(norm).check(0, np.array([mean, variance, 0, 0], np.float32))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: nn.Sequential(nn.LazyLinear(2)), r"0\.weight has no shape yet.*Lazy"),
        (lambda: nn.Linear(2, 2, dtype=torch.complex64), r"weight is complex.*view_as_complex"),
        (
            lambda: nn.ModuleDict({"0": compiled(nn.Linear(2, 2))}),
            r"0 is compiled.*without torch.compile",
        ),
        (lambda: nn.DataParallel(nn.Linear(2, 2)), r"is a DataParallel.*\.module"),
        (lambda: nn.Linear(2, 2, device="meta"), r'on the device "meta"'),
        (lambda: type("Odd", (nn.Linear,), {"get_extra_state": lambda _: 1})(2, 2), r"\(Odd\) has get_extra_state"),
        (lambda: frozen(nn.Linear(2, 2)), r"no trainable parameters; set requires_grad"),
    ],
)
def test_what_cannot_travel_is_refused_by_name_with_the_remedy(make: Callable[[], nn.Module], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        entries_of(make())


def test_two_parameters_in_one_memory_are_refused() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.weight = nn.Parameter(one.weight.data)
    with pytest.raises(ConfigError, match=r"1\.weight shares its memory with 0\.weight"):
        entries_of(nn.Sequential(one, other))


def test_a_buffer_that_training_changes_and_that_does_not_travel_is_refused() -> None:
    task = Any(Counting)
    with pytest.raises(TaskError, match=r"training changed .*the frozen tensor mean differs.*persistent=False"):
        train(task, read_vector(initial_model(task, 0)), SETTINGS, seed=0)


def test_what_a_model_caches_while_it_is_evaluated_can_be_trained_with() -> None:
    task = Any(Caching)
    model = initial_model(task, 0)
    weights = read_vector(model)
    Evaluator(task, model).evaluate(weights)
    Trainer(task, model).train(weights, SETTINGS, seed=0)
    assert not np.array_equal(read_vector(model), weights)


def test_digests_tell_which_frozen_tensor_differs() -> None:
    task = Any(backbone)
    one, other = initial_model(task, 1), initial_model(task, 1)
    assert frozen_digests(one) == frozen_digests(other)
    with torch.no_grad():
        other.get_parameter("1.bias")[3] += 1e-7
    names = list(frozen_of(one))
    assert unlike(names, frozen_digests(other), frozen_digests(one)) == "the frozen tensor 1.bias differs"
    assert unlike(names, frozen_digests(one), b"") == "the number of frozen tensors (7, not 0) differs"
    assert frozen_digests(initial_model(task, 2)) != frozen_digests(one), "drawn from another seed"


def test_the_file_of_a_run_is_a_whole_state_dict(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(Tied(), nn.BatchNorm1d(2), backbone_of_two(), nn.Linear(2, 2, dtype=torch.bfloat16))

    def backbone_of_two() -> nn.Module:
        return nn.Sequential(frozen(nn.Linear(2, 2)), frozen(nn.BatchNorm1d(2)))

    task, path = Any(make), tmp_path / "model.safetensors"
    trained = initial_model(task, 5)
    set_training(trained)
    trained.get_submodule("1")(torch.randn(8, 2))
    write_whole_model(path, task, 5, read_vector(trained), 9)
    loaded = task.model()
    loaded.load_state_dict(load_file(path))
    for (name, value), (_, expected) in zip(loaded.state_dict().items(), trained.state_dict().items(), strict=True):
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    assert loaded.get_parameter("0.decode.weight") is loaded.get_parameter("0.encode.weight")
    assert path.stat().st_mode & 0o077 == 0


def test_a_run_begins_with_the_file_of_another_or_with_a_checkpoint(tmp_path: Path) -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4), frozen(nn.Linear(4, 4)), nn.Linear(4, 2))

    task = Any(make)
    trained = initial_model(task, 5)
    trained(torch.randn(8, 4))
    weights, parameters = read_vector(trained), parameters_of(trained)
    whole, checkpoint = tmp_path / "model.safetensors", tmp_path / "version-1.safetensors"
    write_whole_model(whole, task, 5, weights, 1)
    with TensorFile.create(checkpoint, [(spec.name, spec.shape) for spec in parameters], {}) as file:
        file.write(0, weights)
    for path in (whole, checkpoint):
        model = initial_model(task, 5)
        load_weights(model, path)
        np.testing.assert_allclose(read_vector(model), weights, rtol=1e-5, atol=1e-7)
    with pytest.raises(ConfigError, match=r"1\.bias is frozen, and differs; let model\(\) load it"):
        load_weights(initial_model(task, 6), whole)
