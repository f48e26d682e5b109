"""Finds the kind of problem from a model's outputs and a task's targets, and thus a version's figures.

The default metrics depend on shapes and dtypes. They refuse unknown ones and say what they expect.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from torch import Tensor, nn

from fednats.errors import ConfigError
from fednats.learning.scores import MAX_CLASSES, pooled_names

MAX_DICE_CLASSES = 256

EXPECTED = """expected one of
  scores [n, classes] and int64 targets [n] or [n, 1]: classification
  scores [n] or [n, 1] and targets of the same size, all 0 or 1: two classes from one logit
  scores [n, labels] and floating targets of the same shape, all 0 or 1: several labels a case
  scores and floating targets of the same shape: regression
  scores [n, classes, ...] and int64 targets [n, ...]: segmentation
  scores [n, 1, ...] and targets of the same size, all 0 or 1: segmentation of one structure"""


class Kind(Enum):
    """Kinds of problem; the value is its name for people."""

    CLASSES = "classification"
    BINARY = "two classes from one logit"
    LABELS = "several labels a case"
    REGRESSION = "regression"
    SEGMENTATION = "segmentation"
    MASK = "segmentation of one structure"
    OTHER = "known to the task's own metrics() only"


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for a task's cases, and the figures to expect."""

    kind: Kind
    scores: str
    """Shape and dtype of a batch of outputs."""
    targets: str
    """Shape and dtype of a batch of targets."""
    n_classes: int
    """Classes whose cases are counted, which makes figures exact over all hospitals; 0 if nothing is counted."""
    pooled: tuple[str, ...]
    """Figures over the pooled test cases of all hospitals; those that the cases do not allow are left out."""
    means: tuple[str, ...]
    """Figures that the coordinator gets as means over hospitals, weighted by cases. A task's own ``metrics()`` names
    its figures only when it has run."""

    def __str__(self) -> str:
        """Describe it in one line."""
        figures = [f"{', '.join(self.pooled)} of all hospitals' cases pooled"] if self.pooled else []
        if self.means:
            figures.append(f"{', '.join(self.means)} as means over hospitals")
        if self.kind is Kind.OTHER:
            figures.append("the figures of the task's own metrics() as means over hospitals")
        return f"{self.kind.value}: scores {self.scores}, targets {self.targets}; {'; '.join(figures)}"


MEANS: dict[Kind, tuple[str, ...]] = {
    Kind.CLASSES: ("auc", "accuracy"),
    Kind.BINARY: ("auc", "accuracy"),
    Kind.LABELS: ("auc", "accuracy"),
    Kind.REGRESSION: ("rmse", "mae", "r2"),
    Kind.SEGMENTATION: ("dice", "accuracy"),
    Kind.MASK: ("dice", "accuracy"),
    Kind.OTHER: (),
}
"""Default figures of one hospital, most informative first."""


def outputs_of(scores: object, targets: object, more_targets: Iterable[Tensor] = ()) -> Outputs:
    """Classify a batch of a model's outputs and targets.

    ``more_targets`` are those of other batches. They are read only if targets of 0 and 1 could be numbers or classes.

    Raises:
        ConfigError: the default metrics do not know these shapes and dtypes.
    """
    if not isinstance(scores, Tensor) or not isinstance(targets, Tensor):
        raise ConfigError(f"{unknown(scores, targets)}; both must be tensors, or the task must write metrics()")
    kind = kind_of(scores, targets, more_targets)
    if kind is Kind.OTHER:
        raise ConfigError(f"{unknown(scores, targets)}; {EXPECTED}\nGive one of these, or write the task's metrics()")
    n_classes = {Kind.CLASSES: scores.shape[-1], Kind.BINARY: 2}.get(kind, 0)
    if n_classes > MAX_CLASSES:
        n_classes = 0
    pooled = pooled_names(n_classes) if n_classes else ()
    return Outputs(kind, shape_of(scores), shape_of(targets), n_classes, pooled, () if pooled else MEANS[kind])


def kind_of(scores: Tensor, targets: Tensor, more_targets: Iterable[Tensor] = ()) -> Kind:
    """Return the kind of problem; `Kind.OTHER` for shapes and dtypes that fit none."""
    if not scores.is_floating_point() or not scores.ndim or not targets.ndim or len(scores) != len(targets):
        return Kind.OTHER
    if _as_many_as_outputs(scores, targets):
        return _same_size(scores, targets, more_targets)
    spatial = scores.shape[2:]
    if targets.is_floating_point() or scores.ndim < 2 or targets.numel() != len(targets) * spatial.numel():  # noqa: PLR2004 - [n, classes]
        return Kind.OTHER
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < scores.shape[1]:
        return Kind.OTHER
    if not spatial:
        return Kind.CLASSES
    fits = targets.shape[1:] in {spatial, (1, *spatial)} and scores.shape[1] <= MAX_DICE_CLASSES
    return Kind.SEGMENTATION if fits else Kind.OTHER


def _as_many_as_outputs(scores: Tensor, targets: Tensor) -> bool:
    """Return whether each output has a target: equal shapes, apart from an axis of length 1 after the first."""
    return _without_ones(scores) == _without_ones(targets)


def _without_ones(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape[2:] if tensor.shape[1:2] == (1,) else tensor.shape[1:])


def _same_size(scores: Tensor, targets: Tensor, more_targets: Iterable[Tensor]) -> Kind:
    dims = len(_without_ones(scores))
    are_classes = _only_0_and_1(targets) and all(map(_only_0_and_1, more_targets))
    if are_classes:
        return (Kind.BINARY, Kind.LABELS)[dims] if dims < 2 else Kind.MASK  # noqa: PLR2004 - [n] and [n, labels]
    return Kind.REGRESSION if targets.is_floating_point() else Kind.OTHER


def _only_0_and_1(targets: Tensor) -> bool:
    return bool(((targets == 0) | (targets == 1)).all())


def gives_probabilities(model: nn.Module, scores: object) -> bool:
    """Return whether the model seems to end in a sigmoid or softmax; the default loss and metrics take logits."""
    leaves = [module for module in model.modules() if not any(True for _ in module.children())]
    ends = bool(leaves) and isinstance(leaves[-1], nn.Sigmoid | nn.Softmax)
    return ends and isinstance(scores, Tensor) and bool(((scores >= 0) & (scores <= 1)).all())


def unknown(scores: object, targets: object) -> str:
    """Describe outputs and targets."""
    return f"the model's outputs are {shape_of(scores)}, the targets {shape_of(targets)}"


def shape_of(value: object) -> str:
    """Describe shape and dtype as in ``float32[n, 2]``.

    >>> import torch
    >>> shape_of(torch.zeros(8, 2)), shape_of({"out": 1})
    ('float32[n, 2]', 'dict')
    """
    if not isinstance(value, Tensor):
        return type(value).__name__
    name = str(value.dtype).removeprefix("torch.")
    return f"{name}[{', '.join(['n', *map(str, value.shape[1:])])}]" if value.ndim else name
