"""The coordinator's worker process: decrypt sums, step the model, checkpoint, make the next frames.

It keeps one vector of the model's size in memory, the mean delta, and processes weights and optimiser state in blocks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fednats import wire
from fednats.codec import frames
from fednats.codec import grid as grids
from fednats.codec.layout import Layout, Vector, blocks
from fednats.config import CoordinatorSettings, RunSettings
from fednats.crypto.sealing import ModelKeys
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.errors import ConfigError, ImpossibleModelError, Reason, RefusedError
from fednats.learning.entries import frozen_digests, frozen_of, unlike
from fednats.learning.flat import FlatModel, initial_model, parameters_of
from fednats.learning.initial_weights import load_weights
from fednats.learning.server_optimizer import ServerOptimizer
from fednats.learning.task_code import make_task
from fednats.learning.task_errors import task_code
from fednats.learning.whole_model import write_whole_model
from fednats.messages import Aggregate, Composition, EvaluationSum, Frame, Grid, ModelManifest, Opening
from fednats.services.coordinator.next_version import NextVersion, Provenance, Start, first_version, still_of_use
from fednats.services.coordinator.pooling import pool
from fednats.services.daemon.answers import CurrentVersion, PooledEvaluation
from fednats.services.daemon.keys import read_keys
from fednats.storage.checkpoints import Checkpoint, Checkpoints, checkpoints_folder, frame_file, newest_checkpoint
from fednats.storage.local_disk import local_disk
from fednats.storage.local_model import follow_frame
from fednats.storage.tensor_file import TensorFile, digest_of


class CoordinatorWorker:
    """Holds the secret keys, and the mean delta of the combination under way."""

    def __init__(self, settings: CoordinatorSettings, max_message_bytes: int) -> None:
        torch.set_num_threads(1)
        self._settings = settings
        self._keys = read_keys(settings.secret_key_file, settings.older_secret_key_file, "secret_key_file")
        self._model_keys = ModelKeys.read(settings.model_key_file, settings.older_model_key_file, settings.run)
        self._max_message_bytes = max_message_bytes
        self._state_dir = settings.state_dir
        self._initial = settings.state_dir / "initial.safetensors"
        self._mean = np.zeros(0, np.float32)
        self._delta_norm = 0.0
        self._current: Checkpoint | None = None
        stored = newest_checkpoint(checkpoints_folder(settings.state_dir))
        if stored is not None:
            # a restart may change the first run's settings; later runs keep those in the order that started them
            run = settings.settings if stored.opening.opened_at == 0 else stored.settings
            stored = stored.model_copy(update={"settings": run.model_copy(update={"initial_model": None})})
            self._refuse_changed(self._use(stored.settings), stored)
            self._checkpoints.weights(stored.version).close()
            self._checkpoints.state(stored.version).close()
            self._current = stored

    # --- runs ---------------------------------------------------------------------------------------------------------

    def prepare_run(self, run: RunSettings) -> bytes | None:
        """Check that ``run`` can be opened here, and copy its initial weights; return their digest.

        Returns None, and copies nothing, if the run begins with the weights that the task makes from its seed.

        Raises:
            ConfigError: the keys, the regions, the task or ``initial_model`` do not fit; the text names the remedy.
            HospitalError: the task fails to make the model.
        """
        self._check_delta(run)
        model = self._make_model(run)
        self._refuse_impossible(model)
        if run.training.dp is not None:
            from fednats.privacy.dp_sgd import refuse_unsuitable  # noqa: PLC0415 - opacus is loaded where it is asked for

            refuse_unsuitable(model)
        if run.initial_model is None:
            return None
        load_weights(model, run.initial_model)
        weights, parameters = FlatModel(model), parameters_of(model)
        partial = self._initial.with_suffix(".partial")
        with (
            local_disk(self._state_dir),
            TensorFile.create(partial, [(spec.name, spec.shape) for spec in parameters], {}) as copy,
        ):
            for block in blocks(len(weights)):
                copy.write(block.start, weights[block])
            copy.sync()
        partial.rename(self._initial)
        return digest_of(weights)

    def open_run(self, opening: Opening, run: RunSettings, initial_digest: bytes | None) -> CurrentVersion:
        """Make the first version of ``opening``, unless it exists; durable on return.

        Raises:
            ConfigError: the copy of the initial model is gone or damaged, a key does not fit, or a frozen tensor of an
                extended run has changed.
            LocalStorageError: the disk is full; no version was made.
        """
        current = self._current
        if current is None or current.opening != opening:
            extended = current is not None and current.opening.first_version == opening.first_version
            with local_disk(self._state_dir):
                if current is not None and not extended:
                    self._write_whole(self._checkpoints.keep_run(current), current.version)
                model = self._use(run)
                if extended and current is not None:
                    self._refuse_changed(model, current)
                    start = self._extension(current, opening, run)
                else:
                    start = self._start(model, opening, run, initial_digest)
                self._current = first_version(self._checkpoints, self._model_keys, start, self._run.delta.chunk_bytes)
            self._delta_norm = 0.0
        return self._version()

    def _make_model(self, run: RunSettings) -> nn.Module:
        with task_code("loading the task"):
            self._task = make_task(self._settings.task.path, self._settings.task.options, copy_in=self._state_dir)
            return initial_model(self._task, run.seed)

    def _refuse_impossible(self, model: nn.Module) -> None:
        """Refuse initial weights that no model can hold, such as ones that are not finite. Raises ConfigError."""
        flat = FlatModel(model)
        try:
            for block in blocks(len(flat)):
                flat.check(block.start, flat[block])
        except RefusedError as error:
            raise ConfigError(f"the model as model() makes it cannot be trained: {error.detail}") from None

    def _refuse_changed(self, model: nn.Module, stored: Checkpoint) -> None:
        """Refuse to continue a run if its frozen tensors have changed since it began.

        Raises:
            ConfigError: the text names one that has changed.
        """
        if changed := unlike(list(frozen_of(model)), self._frozen_digests, stored.frozen_digests):
            raise ConfigError(
                f"{self._state_dir}: {changed} from what run {stored.opening.name} began with; restore the task's code, the"
                " file of weights that it loads and the run's seed"
            )

    def _write_whole(self, path: Path, version: int) -> None:
        """Write the whole model of ``version`` to ``path``, so that torch can read it without fednats."""
        with self._checkpoints.weights(version) as weights:
            write_whole_model(path, self._task, self._run.seed, weights, version)

    def _use(self, run: RunSettings) -> nn.Module:
        """Switch to the settings of ``run``; return the model as the task makes it."""
        run = fit_messages(run, self._max_message_bytes)
        self._run = run
        self._decoder, *older = (decoder(run.delta, key) for key in self._keys or (None,))
        self._decoders = {held.key_id: held for held in (self._decoder, *older)}
        self._optimizer = ServerOptimizer(run.server, synchronous=run.aggregation.synchronous)
        model = self._make_model(run)
        self._layout = Layout(parameters_of(model))
        self._frozen_digests = frozen_digests(model)
        self._hollow = FlatModel(model).hollow()
        folder = checkpoints_folder(self._state_dir)
        self._checkpoints = Checkpoints(folder, self._layout.parameters, self._optimizer.slots)
        return model

    def _start(self, model: nn.Module, opening: Opening, run: RunSettings, initial_digest: bytes | None) -> Start:
        weights: Vector = FlatModel(model)
        if initial_digest is not None:
            weights = TensorFile.read(self._initial)
            if digest_of(weights) != initial_digest:
                raise ConfigError(f"{self._initial} is not what run {opening.name} was started with; restore it")
        noise = 0.0 if run.delta.dp is None else run.delta.dp.deviation
        grid = grids.initial(self._layout, weights, self._decoder.qmax, noise, opening.first_version)
        return Start(opening, run, (grid,), weights, self._frozen_digests)

    def _extension(self, current: Checkpoint, opening: Opening, run: RunSettings) -> Start:
        weights, state = self._checkpoints.weights(current.version), self._checkpoints.state(current.version)
        return Start(opening, run, current.grids, weights, current.frozen_digests, state, current.n_steps)

    def _check_delta(self, run: RunSettings) -> None:
        """Refuse delta settings that the kits' keys do not support. Raises as `prepare_run`."""
        kits = self._settings.settings.delta
        if run.delta.tiers != kits.tiers:
            raise ConfigError(f"delta.tiers is {run.delta.tiers}, the federation has {kits.tiers}: set it to that")
        if self._keys and run.delta.cipher == "none":
            raise ConfigError(
                'delta.cipher is "none", but the kits have keys, and nobody who has one takes part: leave it out'
            )
        try:
            scheme.qmax(run.delta)
            for key in self._keys or (None,):
                decoder(run.delta, key)
        except ConfigError as error:
            raise ConfigError(
                f"the kits' key for homomorphic encryption does not serve delta.value_bits = {run.delta.value_bits},"
                f" delta.max_total_weight = {run.delta.max_total_weight} ({error}). Set them as the kits were made with,"
                f" {kits.value_bits} and {kits.max_total_weight}, or make kits for a federation with other settings"
            ) from None

    # --- versions -----------------------------------------------------------------------------------------------------

    def current(self) -> CurrentVersion | None:
        """Return the current version; None before the first run is opened."""
        return None if self._current is None else self._version()

    def _version(self) -> CurrentVersion:
        current = self._newest
        return CurrentVersion(
            version=current.version,
            opening=current.opening,
            settings=self._run,
            made_by=current.made_by,
            parameters=self._layout.parameters,
            weights_digest=current.weights_digest,
            frozen_digests=current.frozen_digests,
            frames=still_of_use(current.frames, self._max_message_bytes),
            grids=current.grids,
            key_id=self._decoder.key_id,
            older_key_ids=tuple(key_id for key_id in self._decoders if key_id != self._decoder.key_id),
            max_total_weight=self._decoder.max_total_weight,
            n_update_chunks=-(-self._layout.n_parameters // self._decoder.values_per_chunk),
            delta_norm=self._delta_norm,
            norms=current.norms,
            quarantined=current.quarantined,
        )

    @property
    def _newest(self) -> Checkpoint:
        assert self._current is not None  # noqa: S101 - a run was opened, or nothing is asked for
        return self._current

    def begin(self) -> None:
        """Start a new combination with a mean of zero; drop what an earlier one left."""
        self._mean = np.zeros(self._layout.n_parameters, np.float32)

    def decrypt(self, head: Aggregate, share: float, position: int, data: bytes) -> float:
        """Decrypt one chunk of ``head`` and add its mean delta times ``share``; return that delta's sum of squares.

        Raises:
            RefusedError: the key or grid is unknown, or the chunk cannot be decrypted or is malformed.
        """
        if head.key_id not in self._decoders:
            raise RefusedError(Reason.WRONG_KEY, f"encrypted for key {head.key_id}, which is no longer held")
        start = position * self._decoder.values_per_chunk
        stop = min(start + self._decoder.values_per_chunk, self._layout.n_parameters)
        steps = self._layout.steps(self._grid(head.grid_id).steps, start, stop)
        sums = self._decoders[head.key_id].decode_chunk(data, head.total_weight, stop - start)
        delta = sums * (steps / np.float32(head.total_weight))
        self._mean[start:stop] += delta * np.float32(share)
        return _squares(delta)

    def apply(
        self,
        combination_id: str,
        heads: Sequence[Aggregate],
        scale: float,
        norms: Mapping[str, float],
        quarantined: Mapping[str, str],
    ) -> CurrentVersion:
        """Step the model along ``scale`` times the mean of the decrypted deltas of ``heads``; durable on return.

        ``norms`` and ``quarantined`` are stored with the version, in case the daemon is killed before it journals them.

        Raises:
            RefusedError: ``not_finite``: the mean delta is not finite; nothing was changed.
            ImpossibleModelError: no model can hold the result; no version was made.
            LocalStorageError: the disk is full; no version was made.
        """
        squares = sum(_squares(self._mean[block]) for block in blocks(self._mean.size))
        if not np.isfinite(squares):
            raise RefusedError(Reason.NOT_FINITE, "the mean delta is not finite")
        adapted = self._adapted_grids(heads)
        self._mean *= np.float32(scale)
        making = NextVersion(
            self._checkpoints,
            self._model_keys,
            self._newest,
            self._layout,
            self._run.delta.chunk_bytes,
            self._max_message_bytes,
            self._hollow.check,
        )
        with local_disk(self._state_dir):
            made = Provenance(combination_id, dict(norms), dict(quarantined))
            try:
                self._current = making.make(self._optimizer, self._mean, made, adapted)
            except RefusedError as error:
                raise ImpossibleModelError(
                    f"version {self._newest.version + 1} would not be a model: {error.detail}"
                ) from None
        self._delta_norm = scale * float(np.sqrt(squares))
        self._mean = np.zeros(0, np.float32)
        return self._version()

    def adopt(
        self,
        manifest: ModelManifest,
        run: RunSettings,
        fetched: Sequence[Frame],
        note: Composition | None,
        noted_grids: Sequence[Grid],
    ) -> CurrentVersion:
        """Replace an older version by that of ``manifest``, made from its ``fetched`` frames on disk.

        The optimiser begins anew, because its state is not on the bus. Durable on return.

        Raises:
            RefusedError: the model is not the task's, no chain of frames leads to the version, a frame is malformed or
                sealed with a key not held here, or the weights do not have the announced digest.
        """
        before = () if self._current is None else self._current.grids
        self._use(run)
        same_frozen = manifest.frozen_digests == self._frozen_digests
        if manifest.parameters != self._layout.parameters or not same_frozen:
            raise RefusedError(Reason.WRONG_SHAPE, "it is of another model than the task's")
        weights, state = self._checkpoints.create(manifest.version)
        for frame in frames.cheapest(fetched, -1, manifest.version):
            path = frame_file(checkpoints_folder(self._state_dir), frame.payload.payload_id)
            follow_frame(path, frame, self._layout, weights, self._model_keys)
        if digest_of(weights) != manifest.weights_digest:
            raise RefusedError(Reason.CHECKSUM, f"version {manifest.version} differs from its digest")
        for block in blocks(self._layout.n_parameters):
            state.write(block.start, weights[block])
        known = {grid.grid_id: grid for grid in (*before, *noted_grids, manifest.grid)}
        self._current = Checkpoint(
            version=manifest.version,
            opening=manifest.opening,
            settings=run.model_copy(update={"initial_model": None}),
            frozen_digests=manifest.frozen_digests,
            n_steps=0,
            made_by="" if note is None else note.made_by,
            weights_digest=manifest.weights_digest,
            grids=tuple(known[grid_id] for grid_id in manifest.grid_ids if grid_id in known),
            frames=tuple(fetched),
            norms={} if note is None else note.norms,
            quarantined={} if note is None else note.quarantined,
        )
        with local_disk(self._state_dir):
            self._checkpoints.commit(self._current, weights, state)
        self._delta_norm = 0.0
        return self._version()

    def pool(
        self, inputs: Sequence[Sequence[bytes]], heads: Sequence[EvaluationSum], min_sites: int
    ) -> PooledEvaluation:
        """Decrypt and pool several regions' sums; see `fednats.services.coordinator.pooling.pool`."""
        return pool(self._decoders[heads[0].key_id].decode_counts, self._run.delta, inputs, heads, min_sites)

    def keep_best(self, version: int) -> bool:
        """Write a version's whole model as the best one; return False if its checkpoint is gone."""
        if not self._checkpoints.has(version):
            return False
        with local_disk(self._state_dir):
            self._write_whole(self._checkpoints.best_file, version)
        return True

    def _grid(self, grid_id: str) -> Grid:
        for grid in self._newest.grids:
            if grid.grid_id == grid_id:
                return grid
        raise RefusedError(Reason.WRONG_GRID, f"grid {grid_id} is not among the last {len(self._newest.grids)}")

    def _adapted_grids(self, heads: Sequence[Aggregate]) -> tuple[Grid, ...]:
        before, max_staleness = self._newest.grids, self._run.aggregation.staleness.max_staleness
        current = before[-1]
        if any(head.grid_id != current.grid_id for head in heads):
            return before  # clipping on an older grid says nothing about this one
        n_values = self._layout.n_parameters * sum(head.n_updates for head in heads)
        saturated = sum(head.saturated for head in heads)
        adapted = grids.adapt(current, self._layout, self._mean, saturated, n_values, self._decoder.qmax)
        if adapted is current:
            return before
        older = tuple(grid for grid in before if grid.grid_id != adapted.grid_id)
        return (*older[-max_staleness:], adapted) if max_staleness else (adapted,)


def fit_messages(run: RunSettings, max_payload_bytes: int) -> RunSettings:
    """Lower the run's ``chunk_bytes`` to what fits into one message of the hub's server."""
    chunk_bytes = min(run.delta.chunk_bytes, max_payload_bytes - wire.ROOM_BYTES)
    return run.model_copy(update={"delta": run.delta.model_copy(update={"chunk_bytes": chunk_bytes})})


def _squares(values: NDArray[np.float32]) -> float:
    return float(np.dot(values, values))
