"""The default loss and metrics know usual shapes of outputs and targets, and refuse the others by name."""

from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, r2_score, roc_auc_score, root_mean_squared_error
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednats import Examples, Task
from fednats.errors import ConfigError, LocalDataError
from fednats.learning import evaluation
from fednats.learning.evaluation import Evaluator, LocalEvaluation, evaluate
from fednats.learning.flat import initial_vector
from fednats.learning.outputs import Kind

N = 70
RNG = np.random.default_rng(5)
X = torch.from_numpy(RNG.normal(size=(N, 4)).astype(np.float32))
IMAGES = torch.from_numpy(RNG.normal(size=(N, 3, 5, 6)).astype(np.float32))
ILL = torch.from_numpy((RNG.random(N) < 0.4).astype(np.int64))
AGE = torch.from_numpy(RNG.normal(60, 8, size=N).astype(np.float32))


class Given(Task):
    """A model and test data as given."""

    net: ClassVar[nn.Module]
    data: ClassVar[tuple[Tensor, Tensor]]

    def model(self) -> nn.Module:
        return self.net

    def train_data(self) -> Examples:
        return TensorDataset(*self.data)

    def test_data(self) -> Examples:
        return TensorDataset(*self.data)


def given(net: nn.Module, inputs: Tensor, targets: Tensor, **methods: Any) -> Task:
    task: Task = type("Own", (Given,), {"net": net, "data": (inputs, targets), **methods})()
    return task


def scored(task: Task) -> tuple[LocalEvaluation, Tensor]:
    model = task.model().eval()
    with torch.no_grad():
        scores = model(task.test_data()[:][0])
    return evaluate(task, initial_vector(task, 0)), scores


class LastAxis(nn.Module):
    """[n, 1] to [n]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(1)


ONE_LOGIT = {
    "scores [n, 1], int [n]": (nn.Linear(4, 1), ILL),
    "scores [n, 1], int [n, 1]": (nn.Linear(4, 1), ILL[:, None]),
    "scores [n], float [n]": (nn.Sequential(nn.Linear(4, 1), LastAxis()), ILL.float()),
    "scores [n], float [n, 1]": (nn.Sequential(nn.Linear(4, 1), LastAxis()), ILL.float()[:, None]),
    "scores [n, 1], bool [n]": (nn.Linear(4, 1), ILL.bool()),
}


@pytest.mark.parametrize("name", ONE_LOGIT)
def test_one_logit_has_the_figures_of_two_classes(name: str) -> None:
    net, targets = ONE_LOGIT[name]
    task = given(net, X, targets)
    found, scores = scored(task)
    exact = roc_auc_score(ILL, scores.reshape(-1))
    right = float(((scores.reshape(-1) > 0) == ILL.bool()).double().mean())
    assert found.metrics["auc"] == pytest.approx(exact)
    assert found.metrics["accuracy"] == pytest.approx(right)
    assert found.counts is not None
    assert found.counts.metrics()["auc"] == pytest.approx(exact, abs=0.01)
    assert found.counts.metrics()["accuracy"] == pytest.approx(right)
    assert found.figures is None  # the counts tell all
    loss = task.loss(net, X, targets)
    expected = nn.functional.binary_cross_entropy_with_logits(scores.reshape(-1), ILL.float())
    torch.testing.assert_close(loss.detach(), expected)


@pytest.mark.parametrize("targets", [ILL, ILL[:, None], ILL.int()], ids=["[n]", "[n, 1]", "int32"])
def test_logits_of_classes_take_labels_in_a_column_too(targets: Tensor) -> None:
    net = nn.Linear(4, 2)
    task = given(net, X, targets)
    found, scores = scored(task)
    assert found.metrics["accuracy"] == pytest.approx(float((scores.argmax(1) == ILL).double().mean()))
    assert found.counts is not None
    torch.testing.assert_close(task.loss(net, X, targets), nn.functional.cross_entropy(net(X), ILL))


@pytest.mark.parametrize("targets", [AGE, AGE[:, None], AGE.double()], ids=["[n]", "[n, 1]", "float64"])
def test_floating_targets_are_regression_and_have_no_accuracy(targets: Tensor) -> None:
    found, scores = scored(given(nn.Linear(4, 1), X, targets))
    got = scores.reshape(-1)
    assert found.metrics.keys() == {"rmse", "mae", "r2"}
    assert found.metrics["rmse"] == pytest.approx(root_mean_squared_error(AGE, got))
    assert found.metrics["mae"] == pytest.approx(mean_absolute_error(AGE, got))
    assert found.metrics["r2"] == pytest.approx(r2_score(AGE, got), rel=1e-5)
    assert (found.counts, found.figures) == (None, ("rmse", "mae", "r2"))


def test_counts_that_begin_with_0_and_1_are_regression_all_the_same() -> None:
    nights = torch.cat([ILL.float(), torch.tensor([2.0])])
    found, _ = scored(given(nn.Linear(4, 1), torch.cat([X, X[:1]]), nights))
    assert "rmse" in found.metrics


def test_regression_without_spread_has_no_r2() -> None:
    found, _ = scored(given(nn.Linear(4, 1), X, torch.full((N,), 7.5)))
    assert found.metrics.keys() == {"rmse", "mae"}
    assert found.figures == ("rmse", "mae", "r2")


def test_several_labels_a_case_are_scored_one_by_one() -> None:
    labels = torch.from_numpy((RNG.random((N, 3)) < 0.3).astype(np.float32))
    labels[:, 2] = 0  # nobody has the third: it has no AUC
    task = given(nn.Linear(4, 3), X, labels)
    found, scores = scored(task)
    each = [roc_auc_score(labels[:, index], scores[:, index]) for index in (0, 1)]
    assert found.metrics["auc"] == pytest.approx(np.mean(each))
    assert found.metrics["accuracy"] == pytest.approx(float(((scores > 0) == (labels > 0)).double().mean()))
    assert found.counts is None


@pytest.mark.parametrize("channel", [False, True], ids=["[n, h, w]", "[n, 1, h, w]"])
def test_segmentation_counts_pixels(channel: bool) -> None:  # noqa: FBT001 - a test's parameter
    structures = torch.from_numpy(RNG.integers(0, 3, (N, 5, 6)))
    task = given(nn.Conv2d(3, 4, 1), IMAGES, structures[:, None] if channel else structures)
    found, scores = scored(task)
    taken_for = scores.argmax(1)
    dice = []
    for index in (1, 2, 3):
        both, either = (
            (taken_for == index) & (structures == index),
            (taken_for == index).sum() + (structures == index).sum(),
        )
        if either:
            dice.append(float(2 * both.sum() / either))
    assert found.metrics["dice"] == pytest.approx(np.mean(dice))
    assert found.metrics["accuracy"] == pytest.approx(float((taken_for == structures).double().mean()))
    assert task.loss(task.model(), IMAGES, structures[:, None] if channel else structures).isfinite()


def test_one_structure_is_a_mask() -> None:
    mask = torch.from_numpy((RNG.random((N, 1, 5, 6)) < 0.3).astype(np.float32))
    found, scores = scored(given(nn.Conv2d(3, 1, 1), IMAGES, mask))
    both = ((scores > 0) & (mask > 0)).sum()
    assert found.metrics["dice"] == pytest.approx(float(2 * both / ((scores > 0).sum() + mask.sum())))


REFUSED = {
    "integers that are neither": (nn.Linear(4, 1), X, torch.arange(N), r"float32\[n, 1\], the targets int64\[n\]"),
    "a class too many": (nn.Linear(4, 2), X, torch.full((N,), 2), r"float32\[n, 2\], the targets int64\[n\]"),
    "floats for classes": (nn.Linear(4, 2), X, AGE, r"float32\[n, 2\], the targets float32\[n\]"),
    "another size": (nn.Linear(4, 3), X, AGE[:, None].repeat(1, 2), r"float32\[n, 3\], the targets float32\[n, 2\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_default_metric_knows_is_refused_with_shape_and_dtype(name: str) -> None:
    net, inputs, targets, what = REFUSED[name]
    with pytest.raises(ConfigError, match=rf"Own: the model's outputs are {what}; expected one of") as raised:
        Evaluator(given(net, inputs, targets), net).outputs  # noqa: B018 - what it raises
    assert "write the task's metrics()" in str(raised.value)


def test_the_default_loss_of_regression_is_refused_not_guessed() -> None:
    net = nn.Linear(4, 1)
    with pytest.raises(
        ConfigError, match=r"outputs are float32\[n, 1\], the targets float32\[n\].*write the task's loss"
    ):
        given(net, X, AGE).loss(net, X, AGE)


def test_probabilities_are_not_taken_for_logits() -> None:
    net = nn.Sequential(nn.Linear(4, 1), nn.Sigmoid())
    with pytest.raises(ConfigError, match="ends in a sigmoid or softmax"):
        Evaluator(given(net, X, ILL), net).outputs  # noqa: B018 - what it raises


def test_own_metrics_may_be_of_anything_and_what_they_raise_is_told_in_full() -> None:
    def metrics(_: Task, scores: Tensor, targets: Tensor) -> dict[str, float]:
        return {"spread": float(scores.std()), "first": float(targets[0, 0])}

    found, scores = scored(given(nn.Linear(4, 3), X, torch.zeros(N, 2, dtype=torch.int64), metrics=metrics))
    assert found.metrics == {"spread": pytest.approx(float(scores.std())), "first": 0.0}

    def broken(_: Task, _scores: Tensor, _targets: Tensor) -> dict[str, float]:
        raise ValueError("only one class in y_true")

    found, _ = scored(given(nn.Linear(4, 2), X, ILL, metrics=broken))
    assert found.counts is not None
    assert "only one class in y_true" in found.problem


def test_outputs_that_are_not_finite_are_named() -> None:
    with pytest.raises(LocalDataError, match="not finite"):
        scored(given(nn.Linear(4, 2), X.index_fill(0, torch.tensor([3]), float("nan")), ILL))


def test_segmentation_is_scored_batch_by_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of all test cases together are more than may be held."""
    monkeypatch.setattr(evaluation, "MAX_SCORES_BYTES", 4000)
    structures = torch.from_numpy(RNG.integers(0, 2, (N, 5, 6)))
    net = nn.Conv2d(3, 2, 1)
    assert "dice" in scored(given(net, IMAGES, structures))[0].metrics
    with pytest.raises(LocalDataError, match="given all outputs at once"):
        scored(given(net, IMAGES, structures, metrics=lambda _, scores, __: {"n": float(len(scores))}))


def test_a_batch_is_as_large_as_the_run_s() -> None:
    seen = []

    class Noting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(len(x))
            return super().forward(x)

    net = Noting(4, 2)
    Evaluator(given(net, X, ILL), net).evaluate(initial_vector(given(net, X, ILL), 0), 20)
    assert seen[-4:] == [20, 20, 20, 10]


def test_what_there_will_be_is_said_in_a_line() -> None:
    net = nn.Linear(4, 1)
    outputs = Evaluator(given(net, X, AGE), net).outputs
    assert outputs.kind is Kind.REGRESSION
    assert str(outputs) == (
        "regression: scores float32[n, 1], targets float32[n]; rmse, mae, r2 as means over hospitals"
    )
    assert "auc, accuracy, ece" in str(Evaluator(given(net, X, ILL), net).outputs)
