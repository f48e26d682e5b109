"""Evaluates a model version on a site's test data."""

import math
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fednats.codec.layout import Vector
from fednats.config import TrainingSettings
from fednats.errors import ConfigError, LocalDataError
from fednats.learning.batches import Batches
from fednats.learning.default_metrics import scoring_of
from fednats.learning.figures import arrangement_of, flat_figures
from fednats.learning.flat import initial_model, write_vector
from fednats.learning.inputs import Inputs, described, predict
from fednats.learning.outputs import Kind, Outputs, gives_probabilities, outputs_of, shape_of
from fednats.learning.scores import Counts
from fednats.learning.task import Task
from fednats.messages import MAX_METRIC

BATCH_SIZE = TrainingSettings().batch_size
MAX_SCORES_BYTES = 2**31
"""Most bytes of outputs that a task's own ``metrics()`` gets at once."""


@dataclass(frozen=True)
class LocalEvaluation:
    """Metrics by name, and the number of test cases behind them."""

    metrics: dict[str, float]
    """All finite."""
    n_samples: int
    counts: Counts | None
    """None if no classes are counted; see `fednats.learning.outputs.Outputs.n_classes`."""
    figures: tuple[str, ...] | None
    """Names of the figures that must be averaged over hospitals, including any that this hospital's cases do not allow.
    None: the counts give all figures."""
    problem: str = ""
    """Traceback of the task's own ``metrics()``, for the hospital only, since it may quote data."""

    @property
    def n_classes(self) -> int:
        """Number of classes whose cases are counted; 0 for none."""
        return 0 if self.counts is None else self.counts.n_classes

    @property
    def arrangement(self) -> int | None:
        """Arrangement of the figures; None if there are none to sum. Raises LocalDataError: there are too many."""
        return None if self.figures is None else arrangement_of(self.figures)

    def flat(self, bits: int) -> NDArray[np.int64]:
        """Return the integers to send, int64[`fednats.learning.figures.n_integers`], each of at most ``bits`` bits."""
        parts = [] if self.counts is None else [self.counts.flat()]
        if self.figures is not None and self.arrangement is not None:
            allowed = {name: self.metrics[name] for name in self.figures if name in self.metrics}
            parts.append(flat_figures(allowed, self.n_samples, self.arrangement, bits))
        return np.concatenate(parts)


class Evaluator:
    """Holds a task's test data between versions. The model is lent, as to a `Trainer`."""

    def __init__(self, task: Task, model: nn.Module) -> None:
        self._task = task
        self.examples = task.test_data()
        self._cases = Batches(task, "test_data", self.examples, model)
        self.lend(model)

    def lend(self, model: nn.Module) -> None:
        """Score with ``model`` from now on."""
        self._model = model

    @cached_property
    def outputs(self) -> Outputs:
        """Kind of the model's outputs for the test cases, and its figures; found by running the model on one batch.

        Raises:
            ConfigError: the default loss or metrics do not know such outputs and targets.
        """
        scores, targets = next(self._scored(BATCH_SIZE))
        own = self._task.has_own_metrics
        if gives_probabilities(self._model, scores):
            if own:
                return self._other(scores, targets)
            raise ConfigError(
                f"{type(self._task).__name__}: the model ends in a sigmoid or softmax, but the default loss and metrics take"
                " logits; leave that layer out, or write loss() and metrics()"
            )
        try:
            found = outputs_of(scores, targets, (batch[1] for batch in self._cases.loader(BATCH_SIZE)))
        except ConfigError as error:
            if own:
                return self._other(scores, targets)
            raise ConfigError(f"{type(self._task).__name__}: {error}") from None
        return found

    def evaluate(self, weights: Vector, batch_size: int = BATCH_SIZE) -> LocalEvaluation:
        """Score every test case with ``weights`` float32[n], ``batch_size`` at a time.

        A metric that is not finite is left out. Exceptions of the task's own ``metrics()`` go into ``problem``.

        Raises:
            ConfigError: as `outputs`.
            LocalDataError: the model's outputs are not finite, a target is not a class of the model, there are more
                outputs than ``metrics()`` can get, or ``weights`` does not have the model's size.
            RefusedError: ``weights`` has a value that the model cannot hold (`FlatModel.check`).
        """
        write_vector(self._model, weights)
        outputs = self.outputs
        tally = _Tally(outputs, own=self._task.has_own_metrics, n_cases=len(self._cases))
        for scores, targets in self._scored(batch_size):
            tally.add(scores, targets)
        return tally.evaluated(self._task)

    def _scored(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._model.eval()
        for inputs, targets in self._cases.loader(batch_size):
            with torch.no_grad():  # not inference mode: training could not use tensors that a model caches in it
                yield self._scores(inputs, len(targets)), targets

    def _scores(self, inputs: Inputs, n_cases: int) -> Tensor:
        try:
            scores = predict(self._model, inputs)
        except Exception as error:
            error.add_note(f"The batch's inputs are {described(inputs)}.")
            raise
        if not isinstance(scores, Tensor):
            raise ConfigError(f"the model gives a {shape_of(scores)}; its forward() must return one tensor")
        if n_cases == 1 and scores.shape[:1] != (1,):
            return scores[None]  # a model that squeezes its outputs also squeezes away a batch of one
        return scores

    def _other(self, scores: object, targets: object) -> Outputs:
        return Outputs(Kind.OTHER, shape_of(scores), shape_of(targets), 0, (), ())


@dataclass
class _Tally:
    """Accumulates the batches of one evaluation."""

    outputs: Outputs
    own: bool
    """Whether the task has metrics of its own."""
    n_cases: int
    counts: Counts | None = None
    n_seen: int = 0
    scores: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._scoring = None if self.own else scoring_of(self.outputs.kind)

    def add(self, scores: Tensor, targets: Tensor) -> None:
        if self.outputs.kind is not Kind.OTHER and not scores.isfinite().all():
            raise LocalDataError(
                "the model's outputs are not finite for some test case: a diverged model, or its input"
            )
        self.n_seen += len(targets)
        if self.outputs.n_classes:
            found = _counts(scores, targets, self.outputs.n_classes)
            self.counts = found if self.counts is None else self.counts + found
        if self._scoring is not None:
            self._scoring.add(scores, targets)
            return
        n_bytes = scores.nbytes // max(1, len(scores)) * self.n_cases
        if n_bytes > MAX_SCORES_BYTES:
            raise LocalDataError(
                f"metrics() is given all outputs at once, {n_bytes / 2**30:.1f} GiB for {self.n_cases} test cases of"
                f" {shape_of(scores)}, at most {MAX_SCORES_BYTES / 2**30:g}; leave metrics() out, let the model give less, or"
                " test on fewer cases"
            )
        self.scores.append(scores)
        self.targets.append(targets)

    def evaluated(self, task: Task) -> LocalEvaluation:
        found, problem = self._figures(task)
        metrics = {name: value for name, value in found.items() if abs(value) <= MAX_METRIC}
        told = set(self.outputs.pooled)
        means = tuple(name for name in (found if self.own else self.outputs.means) if name not in told)
        return LocalEvaluation(metrics, self.n_seen, self.counts, means if self.own or not told else None, problem)

    def _figures(self, task: Task) -> tuple[dict[str, float], str]:
        if self._scoring is not None:
            return self._scoring.figures(), ""
        try:
            found = task.metrics(torch.cat(self.scores), torch.cat(self.targets))
            return {str(name): math.nan if value is None else float(value) for name, value in found.items()}, ""
        except Exception:  # noqa: BLE001 - whatever a task's own code raises
            return {}, traceback.format_exc()


def _counts(scores: Tensor, targets: Tensor, n_classes: int) -> Counts:
    logits, classes = scores.double().numpy(), targets.reshape(-1).long().numpy()
    if logits.ndim == 1 or logits.shape[1] == 1:
        logits = np.stack([np.zeros(len(logits)), logits.reshape(-1)], axis=1)  # softmax of 0 and z is the sigmoid of z
    if not 0 <= classes.min() <= classes.max() < n_classes:
        raise LocalDataError(f"a test case whose target is {classes.min()} or {classes.max()}, of {n_classes} classes")
    return Counts.of(logits, classes)


def evaluate(task: Task, weights: Vector, batch_size: int = BATCH_SIZE, seed: int = 0) -> LocalEvaluation:
    """Return the metrics of ``weights`` float32[n] on the task's test data; see `Evaluator.evaluate`.

    Frozen tensors are made from ``seed``.
    """
    return Evaluator(task, initial_model(task, seed)).evaluate(weights, batch_size)
