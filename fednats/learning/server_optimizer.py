"""The coordinator's optimiser: torch.optim on the pseudo-gradient, the negative mean delta.

FedOpt, Reddi et al. 2021 (arXiv:2003.00295), algorithm 2; its Adam constants are those of the paper's section 5.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn, optim

from fednats.config import ServerSettings

ADAM_BETAS = (0.9, 0.99)
ADAM_EPS = 1e-3


def _sgd(weights: nn.Parameter, settings: ServerSettings, rate: float) -> optim.Optimizer:
    return optim.SGD([weights], rate, momentum=settings.momentum)


def _adam(weights: nn.Parameter, _settings: ServerSettings, rate: float) -> optim.Optimizer:
    return optim.Adam([weights], rate, betas=ADAM_BETAS, eps=ADAM_EPS)


OPTIMIZERS: Mapping[str, Callable[[nn.Parameter, ServerSettings, float], optim.Optimizer]] = {
    "sgd": _sgd,
    "adam": _adam,
}


STATISTIC_RATE = 0.5
"""Share of the mean delta that is applied to running statistics if the rule for weights has a memory."""


class ServerOptimizer:
    """Steps global weights along mean deltas; SGD with rate 1 and no momentum gives exactly weights + delta.

    Running statistics are not weights. Their delta is not a gradient but the distance to their right value, which a
    rule with a memory (momentum, Adam) would overshoot or never reach. So they move by a share of it.

    Every rule works value by value, so a large model is stepped block by block. The caller keeps the state. All slots
    begin as zeros.

    >>> optimizer = ServerOptimizer(ServerSettings())
    >>> weights, slots = optimizer.step(np.zeros(2, np.float32), {}, np.array([0.5, -1.0], np.float32), n_steps=0)
    >>> weights.tolist(), slots
    ([0.5, -1.0], {})
    """

    def __init__(self, settings: ServerSettings, *, synchronous: bool = True) -> None:
        self._settings = settings
        self._rate = settings.rate(synchronous=synchronous)
        self.slots: tuple[str, ...] = {
            "sgd": ("momentum_buffer",) if settings.momentum else (),
            "adam": ("exp_avg", "exp_avg_sq"),
        }[settings.optimizer]
        """Names of the arrays that the rule keeps, one value per weight."""
        has_memory = settings.optimizer != "sgd" or settings.momentum > 0
        self._statistic_rate = np.float32(STATISTIC_RATE if has_memory else min(1.0, self._rate))

    def step(
        self,
        weights: NDArray[np.float32],
        slots: Mapping[str, NDArray[np.float32]],
        mean_delta: NDArray[np.float32],
        n_steps: int,
        statistics: NDArray[np.bool_] | None = None,
    ) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
        """Return weights and slots after one more step; all arrays are float32[m], ``n_steps`` were taken before.

        ``statistics`` bool[m] marks the values that are running statistics; by default none are.

        Raises:
            ValueError: ``mean_delta`` does not have the weights' shape, or is not finite.
        """
        if mean_delta.shape != weights.shape or not np.isfinite(mean_delta).all():
            raise ValueError(f"mean delta of shape {mean_delta.shape}: expected finite values, {weights.shape}")
        parameter = nn.Parameter(torch.tensor(weights))
        optimizer = OPTIMIZERS[self._settings.optimizer](parameter, self._settings, self._rate)
        state: dict[str, object] = {name: torch.tensor(slots[name]) for name in self.slots}
        if self._settings.optimizer == "adam":
            state["step"] = torch.tensor(float(n_steps))
        optimizer.state[parameter] = state
        parameter.grad = -torch.tensor(mean_delta)
        optimizer.step()
        kept = {name: optimizer.state[parameter][name].numpy() for name in self.slots}
        stepped = parameter.detach().numpy()
        if statistics is not None:
            stepped = np.where(statistics, weights + self._statistic_rate * mean_delta, stepped)
        return stepped, kept
