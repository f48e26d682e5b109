"""Local training with record-level differential privacy, in runs that ask for it."""

from collections.abc import Iterable, Sequence

from torch import nn

from fednats.codec.layout import Vector
from fednats.config import TrainingSettings
from fednats.errors import ConfigError
from fednats.learning.entries import set_training
from fednats.learning.task import Task
from fednats.learning.trainer import OPTIMIZERS, LocalPass, Trainer
from fednats.privacy.randomness import Randomness


class PrivateTrainer(Trainer):
    """A `Trainer` that takes DP-SGD steps in runs with ``training.dp``, and ordinary steps in all others."""

    def __init__(self, task: Task, model: nn.Module, randomness: Randomness | None = None) -> None:
        super().__init__(task, model)
        self._randomness = randomness or Randomness()
        self._loss_is_a_mean = False

    def sample_rate(self, settings: TrainingSettings) -> float:
        """Return the probability that a case is in a step's batch; ``batch_size`` is the mean size of a batch."""
        return min(1.0, settings.batch_size / self.n_samples)

    def refuse_unsuitable(self) -> None:
        """Refuse a model or loss that differential privacy does not allow, before anything is charged.

        Raises:
            TaskError: with a layer or the loss, one record affects another's gradient; the text has the remedy.
        """
        from fednats.privacy import dp_sgd  # noqa: PLC0415 - opacus is loaded where a run asks for it

        dp_sgd.refuse_unsuitable(self._model)
        if not self._loss_is_a_mean:
            dp_sgd.check_loss(self._task, self._model, self._cases)
            self._loss_is_a_mean = True

    def train(self, start: Vector, settings: TrainingSettings, seed: int) -> LocalPass:
        """Make a pass as `Trainer.train` does; with ``settings.dp`` nothing random in it follows from ``seed``.

        That includes dropout and augmentation: if anybody could compute the masks, one more record would change those
        of the records after it.
        """
        return super().train(start, settings, seed if settings.dp is None else self._randomness.seed())

    def rehearse(self, start: Vector, settings: TrainingSettings, *, whole: bool) -> None:
        """Take the DP-SGD steps of a pass and discard the result, so that a failure costs nothing.

        It takes one batch of the usual size and an empty one; with ``whole``, every case once.

        Raises:
            TaskError: a layer, or the loss, cannot be trained with differential privacy.
            LocalDataError: a loss is not finite.
        """
        self.refuse_unsuitable()
        size = min(settings.batch_size, self.n_samples)
        stop = self.n_samples if whole else size
        batches = [range(first, min(first + size, stop)) for first in range(0, stop, size)]
        with self._from(start, self._randomness.seed()):
            self._private_steps(settings, [*batches, range(0)])

    def _steps(self, settings: TrainingSettings, seed: int) -> float:
        if settings.dp is None:
            return super()._steps(settings, seed)
        return self._private_steps(settings, (self._draw(settings) for _ in range(settings.local_steps)))

    def _draw(self, settings: TrainingSettings) -> list[int]:
        """Draw the cases of a step, each with probability `sample_rate` independently; there may be none."""
        drawn = self._randomness.uniform(self.n_samples) <= self.sample_rate(settings)
        return [int(index) for index in drawn.nonzero()[0]]

    def _private_steps(self, settings: TrainingSettings, batches: Iterable[Sequence[int]]) -> float:
        """Take one step per batch in ``batches``; return the mean loss per case."""
        from fednats.privacy import dp_sgd  # noqa: PLC0415 - as above

        if settings.dp is None:
            raise ConfigError("training.dp is not set: there is no noise to train with")
        self.refuse_unsuitable()
        set_training(self._model)
        optimizer = OPTIMIZERS[settings.optimizer](self._model, settings)
        expected_size = self.sample_rate(settings) * self.n_samples
        steps = dp_sgd.PrivateSteps(
            self._task, self._model, self._cases, optimizer, settings.dp, expected_size, self._randomness
        )
        total, n_cases = 0.0, 0
        try:
            for batch in batches:
                total += steps.step(batch)
                n_cases += len(batch)
        finally:
            steps.close()
        return total / max(n_cases, 1)
