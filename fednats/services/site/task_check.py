"""Try a task on a hospital's own machine, from loading its data to encoding an update.

Nothing is sent, and nothing is charged to the privacy budget.
"""

import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from fednats.codec import grid
from fednats.codec.layout import Difference, Layout
from fednats.config import DeltaSettings, RecordPrivacySettings, TaskSettings, TrainingSettings
from fednats.delta import scheme
from fednats.delta.encode import encoder
from fednats.errors import FednatsError, HospitalError
from fednats.learning.code_files import read_code
from fednats.learning.describe import Described, describe, few_targets
from fednats.learning.evaluation import Evaluator
from fednats.learning.flat import FlatModel, initial_model, parameters_of, read_vector
from fednats.learning.task import Task
from fednats.learning.task_code import Check, code_path, make_task
from fednats.learning.task_errors import task_code
from fednats.privacy.trainer import PrivateTrainer

TIMED_STEPS = 5
MEBIBYTE = 2**20


@dataclass
class Step:
    """The result of one step of the check."""

    name: str
    lines: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    failure: str = ""
    """Error text, or the traceback of failed task code; empty if the step passed. For the hospital only: it may quote a
    record.
    """


class TaskCheck:
    """Tries one task with a run's settings.

    Args:
        task: the task to try, with a site's options.
        training: the run's local training. If ``dp`` is set, the check also tries training with noise.
        delta: how updates are encoded.
        public_key: key for homomorphic encryption, made for ``delta``; None if updates are not encrypted.
        check_code: checks the task's code against the hospital's policy.
    """

    def __init__(
        self,
        task: TaskSettings,
        training: TrainingSettings,
        delta: DeltaSettings,
        public_key: bytes | None,
        check_code: Check | None = None,
    ) -> None:
        self._settings = task
        self._training = training
        self._delta = delta
        self._public_key = public_key
        self._check_code = check_code
        self._task: Task
        self._model: nn.Module
        self._trainer: PrivateTrainer
        self._evaluator: Evaluator
        self._train_data: Described

    def steps(self) -> Iterator[Step]:
        """Yield each step when it is done. Stop after the first that fails."""
        todo: list[tuple[str, Callable[[Step], None]]] = [
            ("task", self._load),
            ("model", self._make_model),
            ("training data", self._read_train_data),
            ("test data", self._read_test_data),
            ("training", self._train),
            ("evaluation", self._evaluate),
        ]
        if self._training.dp is not None:
            todo.append(("training with noise", self._train_privately))
        for name, attempt in (*todo, ("update", self._encode)):
            step = Step(name)
            try:
                with task_code(name):
                    attempt(step)
            except HospitalError as error:
                step.failure = error.traceback or str(error)
            except FednatsError as error:
                step.failure = str(error)
            yield step
            if step.failure:
                return

    def _load(self, step: Step) -> None:
        self._task = make_task(self._settings.path, self._settings.options, self._check_code)
        step.lines.append(f"{type(self._task).__name__} from {self._settings.path}")
        step.lines.append(f"SHA-256 {read_code(code_path(self._settings.path)).sha256}")

    def _make_model(self, step: Step) -> None:
        self._model = initial_model(self._task, seed=0)
        n_all = sum(parameter.numel() for parameter in self._model.parameters())
        travels = Layout(parameters_of(self._model)).n_parameters
        step.lines.append(f"{n_all:,} parameters; {travels:,} values travel with every update")

    def _read_train_data(self, step: Step) -> None:
        self._trainer = PrivateTrainer(self._task, self._model)
        self._train_data = describe(self._trainer.examples)
        _say(step, self._train_data)
        if self._train_data.n_repeated:
            step.warnings.append(f"{self._train_data.n_repeated:,} cases have the same inputs as another case")

    def _read_test_data(self, step: Step) -> None:
        self._evaluator = Evaluator(self._task, self._model)
        found = describe(self._evaluator.examples)
        _say(step, found)
        if shared := len(found.patients & self._train_data.patients):
            step.warnings.append(f"{shared:,} patients are in the training data and in the test data")
        elif found.patients:
            step.lines.append("no patient is in both the training data and the test data")
        if shared := len(found.digests & self._train_data.digests):
            step.warnings.append(f"{shared:,} cases have the same inputs as a case of the training data")

    def _train(self, step: Step) -> None:
        plain = self._training.model_copy(update={"dp": None, "local_steps": 1})
        start = read_vector(self._model)
        for name in self._trainer.parameters_without_gradient(plain):
            step.warnings.append(f"{name} gets no gradient: freeze it with requires_grad_(False), or use it")
        self._trainer.train(start, plain, seed=0)
        started = time.perf_counter()
        timed = plain.model_copy(update={"local_steps": TIMED_STEPS})
        loss = self._trainer.train(start, timed, seed=0).train_loss
        step_s = (time.perf_counter() - started) / TIMED_STEPS
        n_steps = self._training.local_steps
        step.lines.append(
            f"{step_s:.3g} s per step, so {step_s * n_steps:.3g} s for a pass of {n_steps} steps;"
            f" mean loss of {TIMED_STEPS} steps {loss:.4g}"
        )

    def _evaluate(self, step: Step) -> None:
        step.lines.append(str(self._evaluator.outputs))
        evaluated = self._evaluator.evaluate(read_vector(self._model), self._training.cases_at_once)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in evaluated.metrics.items())
        step.lines.append(f"untrained: {figures or 'no figure'}")
        if evaluated.problem:
            step.failure = evaluated.problem

    def _train_privately(self, step: Step) -> None:
        dp = self._training.dp or RecordPrivacySettings()
        started = time.perf_counter()
        self._trainer.rehearse(read_vector(self._model), self._training, whole=False)
        rate = self._trainer.sample_rate(self._training)
        step.lines.append(
            f"one batch works, in {time.perf_counter() - started:.3g} s; each case is in a batch with probability {rate:.3g},"
            f" noise multiplier {dp.noise_multiplier:g}; nothing was charged"
        )

    def _encode(self, step: Step) -> None:
        start = read_vector(initial_model(self._task, seed=0))
        layout = Layout(parameters_of(self._model))
        steps = grid.initial(layout, start, scheme.qmax(self._delta))
        encode = encoder(self._delta, self._public_key)
        started = time.perf_counter()
        delta = Difference(FlatModel(self._model), start)
        chunks = encode.encode(delta, np.zeros_like(start), layout, steps, np.random.default_rng(0))
        n_bytes = sum(len(chunk.data) for chunk in chunks)
        step.lines.append(
            f"{n_bytes:,} bytes, {n_bytes / layout.n_parameters:.3g} per value, cipher {self._delta.cipher},"
            f" encoded in {time.perf_counter() - started:.3g} s"
        )
        kilobytes = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilobytes
        step.lines.append(f"peak memory of this check: {peak / MEBIBYTE:,.0f} MiB")


def _say(step: Step, found: Described) -> None:
    seen = "" if found.n_seen == found.n_cases else f", of which the first {found.n_seen:,} were looked at"
    step.lines.append(f"{found.n_cases:,} cases{seen}: {found.kinds.most_common(1)[0][0]}")
    if len(found.kinds) > 1:
        others = "; ".join(f"{n:,} with {kind}" for kind, n in found.kinds.most_common(4)[1:])
        step.warnings.append(f"not all cases are alike: {others}")
    if classes := few_targets(found):
        step.lines.append("cases by target: " + ", ".join(f"{target}: {n:,}" for target, n in classes.items()))
        if len(classes) == 1:
            step.warnings.append("all targets are the same: nothing can be learned here, and there is no AUC")
    if found.patients:
        step.lines.append(f"{len(found.patients):,} patients")
    if found.missing:
        step.lines.append("missing values: " + ", ".join(f"{name} {n:,}" for name, n in found.missing.items()))
    if found.n_not_finite:
        step.warnings.append(f"{found.n_not_finite:,} cases have a value that is not finite (NaN or infinite)")
