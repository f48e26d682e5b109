"""Local training with differential privacy of each record, where the run asks for it."""

from torch import nn

from fednats.codec.layout import Vector
from fednats.config import TrainingSettings
from fednats.learning.entries import set_training
from fednats.learning.task import Task
from fednats.learning.trainer import OPTIMIZERS, LocalPass, Trainer
from fednats.privacy.randomness import Randomness


class PrivateTrainer(Trainer):
    """A `Trainer` that takes the steps of DP-SGD in a run with ``training.dp``, and those of its parent in any other."""

    def __init__(self, task: Task, model: nn.Module, randomness: Randomness | None = None) -> None:
        super().__init__(task, model)
        self._randomness = randomness or Randomness()
        self._loss_is_a_mean = False

    def sample_rate(self, settings: TrainingSettings) -> float:
        """Probability with which each case is in the batch of a step; ``batch_size`` is the mean size of a batch."""
        return min(1.0, settings.batch_size / self.n_samples)

    def refuse_unsuitable(self) -> None:
        """Refuse what cannot be trained with differential privacy before anything is charged for it.

        Raises:
            TaskError: a layer, or the loss, makes one record act on another's gradient; the text has the remedy.
        """
        from fednats.privacy import dp_sgd  # noqa: PLC0415 - opacus is loaded where a run asks for it

        dp_sgd.refuse_unsuitable(self._model)
        if not self._loss_is_a_mean:
            dp_sgd.check_loss(self._task, self._model, self._data, self.n_samples)
            self._loss_is_a_mean = True

    def train(self, start: Vector, settings: TrainingSettings, seed: int) -> LocalPass:
        """Make a pass as `Trainer.train`; with ``settings.dp`` nothing random in it follows from ``seed``.

        Dropout and augmentation neither: with masks that anybody can compute, one record more would change those of the
        records after it.
        """
        return super().train(start, settings, seed if settings.dp is None else self._randomness.seed())

    def _steps(self, settings: TrainingSettings, seed: int) -> float:
        if settings.dp is None:
            return super()._steps(settings, seed)
        from fednats.privacy import dp_sgd  # noqa: PLC0415 - as above

        self.refuse_unsuitable()
        set_training(self._model)
        optimizer = OPTIMIZERS[settings.optimizer](self._model, settings)
        steps = dp_sgd.PrivateSteps(
            *(self._task, self._model, self._data, self.n_samples),
            optimizer,
            settings.dp,
            self.sample_rate(settings),
            self._randomness,
        )
        total, n_cases = 0.0, 0
        try:
            for _ in range(settings.local_steps):
                batch = steps.batch()
                total += steps.step(batch)
                n_cases += len(batch)
        finally:
            steps.close()
        return total / max(n_cases, 1)
