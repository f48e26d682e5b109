"""A task whose local steps take a set time, as on a machine of each hospital's own.

Hospitals that share this machine's processors would slow each other down, and a bench would measure how many there are.
"""

import time
from typing import Any

from torch import Tensor, nn

from fednats.learning.tasks.breast_cancer import BreastCancer


class PacedBreastCancer(BreastCancer):
    """The task ``breast-cancer``, asleep for ``step_s`` in each local step; it leaves the processor to the others."""

    def __init__(self, *, step_s: float = 0.0, **options: Any) -> None:
        super().__init__(**options)
        self._step_s = step_s

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy, later."""
        time.sleep(self._step_s)
        return super().loss(model, inputs, targets)
