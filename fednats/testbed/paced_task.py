"""A task whose local steps take a set time, as if each hospital had its own machine.

Otherwise hospitals that share this machine's processors would slow each other down, and a benchmark would measure their
number.
"""

import time
from typing import Any

from torch import Tensor, nn

from fednats.learning.tasks.breast_cancer import BreastCancer


class PacedBreastCancer(BreastCancer):
    """The task ``breast-cancer``, which sleeps for ``step_s`` in each local step and so leaves the processor free."""

    def __init__(self, *, step_s: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self._step_s = step_s

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Sleep, then return the cross entropy."""
        time.sleep(self._step_s)
        return super().loss(model, inputs, targets)
