"""Default metrics of one hospital's test cases, computed batch by batch; only what the metric needs is kept."""

from abc import ABC, abstractmethod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fednats.errors import ConfigError
from fednats.learning.outputs import Kind, outputs_of

Figures = dict[str, float]


class Scoring(ABC):
    """Takes in batches of scores and targets, then computes the figures."""

    @abstractmethod
    def add(self, scores: Tensor, targets: Tensor) -> None:
        """Take in a batch with as many scores as targets."""

    @abstractmethod
    def figures(self) -> Figures:
        """Return the figures; those that the cases do not allow are left out."""


def default_metrics(scores: Tensor, targets: Tensor) -> Figures:
    """Return the default figures for all ``scores`` and ``targets`` at once; see `fednats.learning.outputs.outputs_of`.

    Raises:
        ConfigError: their shapes and dtypes are unknown.
    """
    scoring = scoring_of(outputs_of(scores, targets).kind)
    scoring.add(scores, targets)
    return scoring.figures()


def scoring_of(kind: Kind) -> Scoring:
    """Return a `Scoring` for the default figures of a kind of problem."""
    match kind:
        case Kind.CLASSES:
            return _Classes()
        case Kind.BINARY | Kind.LABELS:
            return _Labels()
        case Kind.REGRESSION:
            return _Regression()
        case Kind.SEGMENTATION:
            return _Pixels(one_structure=False)
        case Kind.MASK:
            return _Pixels(one_structure=True)
        case Kind.OTHER:
            raise ConfigError("outputs that no default metric knows; write the task's metrics()")


class _Classes(Scoring):
    """``accuracy``; ``auc``, one against the rest, averaged over the classes, left out if a class has no case."""

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, scores: Tensor, targets: Tensor) -> None:
        self._scores.append(scores.double().softmax(1))
        self._targets.append(targets.reshape(-1).long())

    def figures(self) -> Figures:
        probabilities, targets = torch.cat(self._scores), torch.cat(self._targets)
        found = {"accuracy": float((probabilities.argmax(1) == targets).double().mean())}
        n_classes = probabilities.shape[1]
        if len(np.unique(targets)) == n_classes:
            ranked = probabilities[:, 1] if n_classes == 2 else probabilities  # noqa: PLR2004 - binary
            found["auc"] = _auc(targets.numpy(), ranked.numpy())
        return found


class _Labels(Scoring):
    """``accuracy`` at even odds over all outputs; ``auc`` averaged over the outputs that have both answers."""

    def __init__(self) -> None:
        self._scores: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, scores: Tensor, targets: Tensor) -> None:
        self._scores.append(scores.double().reshape(len(scores), -1))
        self._targets.append(targets.reshape(len(targets), -1) > 0)

    def figures(self) -> Figures:
        scores, targets = torch.cat(self._scores), torch.cat(self._targets)
        found = {"accuracy": float(((scores > 0) == targets).double().mean())}
        both = [index for index in range(targets.shape[1]) if targets[:, index].any() and not targets[:, index].all()]
        if both:
            found["auc"] = float(np.mean([_auc(targets[:, each].numpy(), scores[:, each].numpy()) for each in both]))
        return found


class _Regression(Scoring):
    """``rmse``; ``mae``; ``r2``, 1 minus squared error over variance, averaged over the outputs whose targets vary."""

    def __init__(self) -> None:
        self._n_cases = 0
        self._absolute = self._squared = self._sum = self._squares = torch.zeros(())
        self._origin: Tensor | None = None

    def add(self, scores: Tensor, targets: Tensor) -> None:
        outputs = -1 if scores.ndim <= 2 else 1  # noqa: PLR2004 - [n, outputs]; an image's pixels are one output
        wanted = targets.double().reshape(len(targets), outputs) if outputs == -1 else targets.double().reshape(-1, 1)
        got = scores.double().reshape(wanted.shape)
        if self._origin is None:
            self._origin = wanted[0]
        error, apart = got - wanted, wanted - self._origin  # sums of values near 0 lose no digits
        self._n_cases += len(wanted)
        self._absolute = self._absolute + error.abs().sum(0)
        self._squared = self._squared + (error**2).sum(0)
        self._sum = self._sum + apart.sum(0)
        self._squares = self._squares + (apart**2).sum(0)

    def figures(self) -> Figures:
        found = {
            "rmse": float((self._squared.mean() / self._n_cases).sqrt()),
            "mae": float(self._absolute.mean() / self._n_cases),
        }
        spread = self._squares - self._sum**2 / self._n_cases
        varies = spread > 1e-12 * (1 + self._squares)
        if varies.any():
            found["r2"] = float((1 - self._squared[varies] / spread[varies]).mean())
        return found


class _Pixels(Scoring):
    """``accuracy`` of pixels; ``dice`` = 2 TP / (2 TP + FP + FN), averaged over the classes but 0, the background.

    All pixels of the hospital count together (Dice, 1945). A class neither present nor predicted is left out.
    """

    def __init__(self, *, one_structure: bool) -> None:
        self._one_structure = one_structure
        self._confusion: NDArray[np.int64] | None = None

    def add(self, scores: Tensor, targets: Tensor) -> None:
        n_classes = 2 if self._one_structure else scores.shape[1]
        taken_for = (scores > 0).long() if self._one_structure else scores.argmax(1)
        places = targets.reshape(-1).long() * n_classes + taken_for.reshape(-1)
        counted = torch.bincount(places, minlength=n_classes**2).reshape(n_classes, n_classes).numpy()
        self._confusion = counted if self._confusion is None else self._confusion + counted

    def figures(self) -> Figures:
        confusion = self._confusion
        assert confusion is not None  # noqa: S101 - figures are asked for after a batch
        found = {"accuracy": float(np.trace(confusion) / confusion.sum())}
        twice, there = 2 * np.diag(confusion), confusion.sum(0) + confusion.sum(1)
        shown = [index for index in range(1, len(confusion)) if there[index]]
        if shown:
            found["dice"] = float(np.mean(twice[shown] / there[shown]))
        return found


def _auc(targets: NDArray[np.generic], ranked: NDArray[np.float64]) -> float:
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - slow to load, and a coordinator never needs it

    return float(roc_auc_score(targets, ranked, multi_class="ovr"))
