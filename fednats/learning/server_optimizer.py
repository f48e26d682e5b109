"""The coordinator's optimiser: torch.optim on the pseudo-gradient, the negative mean delta.

FedOpt, Reddi et al. 2021 (arXiv:2003.00295), algorithm 2; its Adam constants are those of the paper's section 5.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn, optim

from fednats.config import ServerSettings
from fednats.errors import ConfigError

ADAM_BETAS = (0.9, 0.99)
ADAM_EPS = 1e-3


def _sgd(weights: nn.Parameter, settings: ServerSettings) -> optim.Optimizer:
    return optim.SGD([weights], settings.learning_rate, momentum=settings.momentum)


def _adam(weights: nn.Parameter, settings: ServerSettings) -> optim.Optimizer:
    return optim.Adam([weights], settings.learning_rate, betas=ADAM_BETAS, eps=ADAM_EPS)


OPTIMIZERS: Mapping[str, Callable[[nn.Parameter, ServerSettings], optim.Optimizer]] = {"sgd": _sgd, "adam": _adam}


class ServerOptimizer:
    """Steps the global weights along mean deltas; SGD with rate 1 and no momentum gives exactly weights + delta.

    >>> optimizer = ServerOptimizer(ServerSettings(), np.zeros(2, np.float32))
    >>> optimizer.step(np.array([0.5, -1.0], np.float32))
    array([ 0.5, -1. ], dtype=float32)
    """

    def __init__(self, settings: ServerSettings, weights: NDArray[np.float32]) -> None:
        self._weights = nn.Parameter(torch.tensor(weights, dtype=torch.float32))
        self._optimizer = OPTIMIZERS[settings.optimizer](self._weights, settings)
        self._name = settings.optimizer

    @property
    def weights(self) -> NDArray[np.float32]:
        """The global weights, a copy, float32[n]."""
        weights: NDArray[np.float32] = self._weights.detach().numpy().copy()
        return weights

    def step(self, mean_delta: NDArray[np.float32]) -> NDArray[np.float32]:
        """Apply the mean delta float32[n]; returns the new weights, a copy.

        Raises:
            ValueError: ``mean_delta`` is not of the weights' shape or not finite; the weights are as they were.
        """
        if mean_delta.shape != tuple(self._weights.shape) or not np.isfinite(mean_delta).all():
            raise ValueError(f"mean delta of shape {mean_delta.shape}: expected finite values, {self._weights.shape}")
        self._weights.grad = -torch.tensor(mean_delta, dtype=torch.float32)
        self._optimizer.step()
        return self.weights

    def state(self) -> dict[str, NDArray[np.float32]]:
        """Everything a restart needs, weights included, as float32 arrays for a safetensors checkpoint."""
        slots = self._optimizer.state.get(self._weights, {})
        kept = {name: value.numpy().copy() for name, value in slots.items() if isinstance(value, torch.Tensor)}
        return {"weights": self.weights, **kept}

    def load_state(self, state: Mapping[str, NDArray[np.float32]]) -> None:
        """Continue, bit for bit, from what `state` gave.

        Raises:
            ConfigError: the state is another optimiser's or another model's.
        """
        slots = {name: torch.tensor(value) for name, value in state.items()}
        weights = slots.pop("weights", None)
        allowed = {"sgd": {"momentum_buffer"}, "adam": {"step", "exp_avg", "exp_avg_sq"}}[self._name]
        shapes = {tuple(value.shape) for name, value in slots.items() if name != "step"}
        if weights is None or weights.shape != self._weights.shape or not shapes <= {tuple(weights.shape)}:
            raise ConfigError("checkpoint is another model's: its tensors are not of this model's size")
        if not set(slots) <= allowed:
            raise ConfigError(f"checkpoint holds {sorted(slots)}, not the state of the server optimiser {self._name!r}")
        with torch.no_grad():
            self._weights.copy_(weights)
        self._optimizer.state.clear()
        if slots:
            self._optimizer.state[self._weights] = slots
