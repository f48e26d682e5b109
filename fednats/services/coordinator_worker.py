"""What the coordinator does in its worker process: decrypt sums, step the model, checkpoint, pack the next version."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fednats import wire
from fednats.codec import grid as grids
from fednats.codec.layout import Layout
from fednats.config import CoordinatorSettings
from fednats.delta.decode import decoder
from fednats.errors import ConfigError, Reason, RefusedError
from fednats.learning.flat import initial_vector, parameters_of
from fednats.learning.server_optimizer import ServerOptimizer
from fednats.learning.task import make_task
from fednats.messages import Aggregate, Chunk, Grid, ParameterSpec
from fednats.services.keys import read_key
from fednats.storage.checkpoints import Checkpoint, Checkpoints

VALUES_PER_MODEL_CHUNK = 65_536
"""float32 weights in one chunk of a model version: 256 KiB."""


@dataclass(frozen=True)
class Version:
    """The current model version, as far as the daemon needs it."""

    version: int
    made_by: str
    parameters: tuple[ParameterSpec, ...]
    grids: tuple[Grid, ...]
    key_id: str
    max_total_weight: int
    n_update_chunks: int
    n_model_chunks: int
    delta_norm: float
    """L2 norm of the last mean delta; 0 for the first version."""


class CoordinatorWorker:
    """Holds the secret key, the model and the server optimiser."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        torch.set_num_threads(1)
        run = settings.settings
        secret_key = read_key(settings.secret_key_file, "secret_key_file")
        task = make_task(settings.task.path, settings.task.options)
        self._layout = Layout(parameters_of(task.model()))
        self._decoder = decoder(run.delta, secret_key)
        self._checkpoints = Checkpoints(settings.state_dir / "checkpoints")
        self._max_staleness = run.aggregation.staleness.max_staleness
        weights = initial_vector(task, run.seed)
        self._optimizer = ServerOptimizer(run.server, weights)
        self._sums: dict[str, list[NDArray[np.float32]]] = {}
        self._delta_norm = 0.0
        stored = self._checkpoints.newest()
        if stored is None:
            first = grids.initial(self._layout, weights, self._decoder.qmax)
            stored = Checkpoint(version=0, state=self._optimizer.state(), grids=(first,), made_by="")
            self._checkpoints.save(stored)
        elif stored.state["weights"].shape != weights.shape:
            raise ConfigError(
                f"{settings.state_dir}: holds a model of {stored.state['weights'].size} parameters, the task's has"
                f" {weights.size}; give the new run a state_dir of its own"
            )
        self._optimizer.load_state(stored.state)
        self._weights = self._optimizer.weights
        self._version, self._grids, self._made_by = stored.version, stored.grids, stored.made_by

    def current(self) -> Version:
        """Return the current version."""
        return Version(
            version=self._version,
            made_by=self._made_by,
            parameters=self._layout.parameters,
            grids=self._grids,
            key_id=self._decoder.key_id,
            max_total_weight=self._decoder.max_total_weight,
            n_update_chunks=-(-self._layout.n_parameters // self._decoder.values_per_chunk),
            n_model_chunks=-(-self._layout.n_parameters // VALUES_PER_MODEL_CHUNK),
            delta_norm=self._delta_norm,
        )

    def model_chunk(self, index: int) -> bytes:
        """Return one chunk of the current version, ready to publish."""
        start = index * VALUES_PER_MODEL_CHUNK
        part = self._weights[start : start + VALUES_PER_MODEL_CHUNK]
        return wire.pack(Chunk(parts=(part.astype("<f4").tobytes(),)))

    def begin(self, combination_id: str) -> None:
        """Start a new combination, dropping what an earlier one left."""
        self._sums = {combination_id: []}

    def decrypt(self, head: Aggregate, position: int, data: bytes) -> None:
        """Decrypt one chunk of ``head`` and keep its mean delta.

        Raises:
            RefusedError: it cannot be decrypted, or does not hold what such a chunk must.
        """
        start = position * self._decoder.values_per_chunk
        stop = min(start + self._decoder.values_per_chunk, self._layout.n_parameters)
        sums = self._decoder.decode_chunk(data, head.total_weight)
        if sums.size < stop - start or sums[stop - start :].any():
            raise RefusedError(Reason.WRONG_SHAPE, f"chunk {position} is not of {stop - start} values")
        steps = self._layout.steps(self._grid(head.grid_id), start, stop)
        self._sums.setdefault(head.aggregate_id, []).append(
            sums[: stop - start] * (steps / np.float32(head.total_weight))
        )

    def apply(self, combination_id: str, heads: Sequence[Aggregate], masses: Sequence[float], scale: float) -> Version:
        """Step the model along ``scale`` times the mean of the decrypted deltas by mass; durable on return."""
        total = sum(masses)
        mean = np.zeros(self._layout.n_parameters, np.float32)
        for head, mass in zip(heads, masses, strict=True):
            mean += np.concatenate(self._sums.pop(head.aggregate_id)) * np.float32(mass / total)
        self._sums.clear()
        if not np.isfinite(mean).all():
            raise RefusedError(Reason.NOT_FINITE, "the mean delta is not finite")
        self._weights = self._optimizer.step(mean * np.float32(scale))
        self._delta_norm = float(np.linalg.norm(mean))
        self._version += 1
        self._made_by = combination_id
        self._adapt(heads, mean)
        self._checkpoints.save(
            Checkpoint(version=self._version, state=self._optimizer.state(), grids=self._grids, made_by=combination_id)
        )
        return self.current()

    def keep_best(self, version: int) -> bool:
        """Keep a version as the best one; False if its checkpoint is gone already."""
        return self._checkpoints.keep_best(version)

    def _grid(self, grid_id: str) -> Grid:
        for grid in self._grids:
            if grid.grid_id == grid_id:
                return grid
        raise RefusedError(Reason.WRONG_GRID, f"grid {grid_id} is not among the last {len(self._grids)}")

    def _adapt(self, heads: Sequence[Aggregate], mean: NDArray[np.float32]) -> None:
        current = self._grids[-1]
        on_current = [head for head in heads if head.grid_id == current.grid_id]
        if len(on_current) < len(heads):
            return  # what was clipped on an older grid says nothing of this one
        n_values = self._layout.n_parameters * sum(head.n_updates for head in heads)
        saturated = sum(head.saturated for head in heads)
        adapted = grids.adapt(current, self._layout, mean, saturated, n_values, self._decoder.qmax)
        if adapted is not current:
            older = tuple(grid for grid in self._grids if grid.grid_id != adapted.grid_id)
            self._grids = (*older[-self._max_staleness :], adapted) if self._max_staleness else (adapted,)
