"""The site's worker process: load data, train, evaluate, encode updates into the outbox."""

import ctypes
import hashlib
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from fednats import wire
from fednats.codec.layout import Layout, Vector, blocks
from fednats.config import SiteSettings, TrainingSettings
from fednats.crypto.sealing import ModelKeys
from fednats.delta import scheme
from fednats.delta.encode import encoder
from fednats.delta.scheme import count_bits
from fednats.errors import LocalDataError, Reason, RefusedError
from fednats.learning.entries import frozen_digests, frozen_of, unlike
from fednats.learning.evaluation import Evaluator
from fednats.learning.flat import FlatModel, initial_model, parameters_of
from fednats.learning.task_code import make_task
from fednats.learning.task_errors import task_code
from fednats.learning.trainer import load_optimizers
from fednats.messages import Frame, ModelManifest, ParameterSpec, Payload, Update
from fednats.privacy.guard import Guard, Left
from fednats.privacy.policy import read_policy
from fednats.privacy.skellam import SkellamRounding
from fednats.privacy.spending import Spending
from fednats.privacy.trainer import PrivateTrainer
from fednats.services.daemon.answers import Prepared, Scored, Trained
from fednats.services.daemon.keys import checked_key_id, held, read_keys
from fednats.storage.local_disk import local_disk
from fednats.storage.local_model import LocalModel, model_folder, read_or_drop
from fednats.storage.outbox import ChunkKey, Outbox, first_number, outbox_file
from fednats.storage.tensor_file import TensorFile

if TYPE_CHECKING:
    from fednats.privacy.account import Charge

OUTBOX_BYTES = 5
"""Bytes per parameter that the outbox keeps besides the chunks: a residual (float32) and a quantised value (int8)."""


@dataclass
class Pass:
    """A finished local pass, whose result is in the model until it is encoded."""

    version: int
    seed: int
    n_samples: int
    goes_on: bool
    dp_sgd: bool
    booked: "Sequence[Charge]" = ()
    """What an earlier, failed attempt to store its update charged."""


class SiteWorker:
    """Holds the task, the data, one model, and the result of the last local pass until it is encoded."""

    def __init__(self, settings: SiteSettings) -> None:
        torch.set_num_threads(1)
        self._settings = settings
        self._keys = read_keys(settings.public_key_file, settings.older_public_key_file, "public_key_file")
        self._model_keys = ModelKeys.read(settings.model_key_file, settings.older_model_key_file, settings.run)
        self._policy = read_policy(settings.policy_file)
        self._task_sha256 = ""
        alone = bool(self._policy.task_sha256)
        with task_code("loading the task"):
            path, options = settings.task.path, settings.task.options
            self._task = make_task(path, options, self._check_code, copy_in=settings.state_dir, alone=alone)
            model = initial_model(self._task, seed=0)
            self._trainer = PrivateTrainer(self._task, model)
            self._evaluator = Evaluator(self._task, model)
        self._take(model)
        self._seed = 0
        self._outbox = Outbox(outbox_file(settings.state_dir), first_number(time.time()))
        self._weights = LocalModel(model_folder(settings.state_dir))
        self._local = settings.state_dir / "local.safetensors"
        self._guard = Guard(settings, self._policy)
        self._pass: Pass | None = None
        self._rehearsed: TrainingSettings | None = None

    def _check_code(self, path: Path, sha256: str) -> None:
        self._task_sha256 = sha256
        self._policy.check_task(path, sha256)

    def prepare(self) -> Prepared:
        """Load the optimisers, and evaluate one batch.

        Raises:
            HospitalError: the task fails.
            ConfigError: the default metrics do not fit its outputs and targets.
        """
        load_optimizers()
        with task_code("evaluating one batch"):
            outputs = str(self._evaluator.outputs)
        return Prepared(self._task_sha256, self._trainer.n_samples, outputs)

    def try_batch(self) -> tuple[str, ...]:
        """Train on one batch and discard the result; return the names of parameters without a gradient.

        Raises:
            HospitalError: the task fails, or its loss is not finite.
        """
        with task_code("training on one batch"):
            return tuple(self._trainer.parameters_without_gradient(TrainingSettings()))

    def check(self, manifest: ModelManifest) -> None:
        """Refuse a manifest that does not fit this site's task or key, or that its policy forbids.

        Raises:
            RefusedError: the policy forbids it, or parameters, frozen tensors, key, grid or frames do not fit.
            HospitalError: the task fails to make the model.
        """
        if manifest.parameters != self._layout.parameters:
            detail = _difference(manifest.parameters, self._layout.parameters)
            raise RefusedError(Reason.WRONG_SHAPE, f"the announced model is not this site's: {detail}")
        self._make_as(manifest)
        self._policy.check_run(manifest, self._trainer.n_samples)
        public_key = held(self._keys, manifest.key_id)
        if public_key is not None and manifest.delta.cipher == "none":
            raise RefusedError(Reason.POLICY, "the run is not encrypted, but this site has a public_key_file")
        key_id = checked_key_id(lambda: encoder(manifest.delta, public_key).key_id)
        if manifest.key_id != key_id:
            raise RefusedError(Reason.WRONG_KEY, f"announced for key {manifest.key_id}, public_key_file holds {key_id}")
        if len(manifest.grid.steps) != len(manifest.parameters):
            raise RefusedError(
                Reason.WRONG_GRID, f"{len(manifest.grid.steps)} steps for {len(manifest.parameters)} tensors"
            )
        for frame in manifest.frames:
            self._weights.check(frame, self._layout.n_parameters)

    def begin_run(self, first_version: int) -> int:
        """Drop what belongs to runs before ``first_version``; return the number of updates dropped from the outbox.

        Raises:
            LocalStorageError: the disk does not take it; no update was dropped.
        """
        if self._pass is not None and self._pass.version < first_version:
            self._pass = None
        if self._local.exists():
            with read_or_drop(self._local) as local:
                is_earlier = int(local.metadata.get("version", -1)) < first_version
            if is_earlier:
                self._local.unlink()
        return self._outbox.begin_run(first_version)

    def advance(self, manifest: ModelManifest, chain: tuple[Frame, ...]) -> None:
        """Build the weights of ``manifest`` from fetched frames. Raises as `LocalModel.advance`."""
        with local_disk(self._settings.state_dir):
            self._weights.advance(manifest, chain, self._model_keys)

    def evaluate(self, manifest: ModelManifest) -> Scored:
        """Evaluate the weights of ``manifest`` on the test data; encrypt the counts that leave the hospital."""
        self._make_as(manifest)
        with self._weights.weights(manifest.version) as weights, task_code("evaluating"):
            found = self._evaluator.evaluate(weights, manifest.training.cases_at_once)
        encode = encoder(manifest.delta, held(self._keys, manifest.key_id))
        return Scored(
            metrics=found.metrics,
            n_samples=found.n_samples,
            key_id=encode.key_id,
            n_classes=found.n_classes,
            arrangement=found.arrangement,
            figures=found.figures or (),
            chunks=encode.encode_counts(found.flat(count_bits(manifest.delta))),
            problem=found.problem,
        )

    def train(self, manifest: ModelManifest, goes_on: bool) -> Trained:  # noqa: FBT001 - a worker's call has no names
        """Make one local pass from the weights of ``manifest``; keep the result here until `encode`.

        With ``goes_on`` the pass starts where the last such pass on that version ended, and `encode` notes where it
        ends. Before the privacy account is charged, the worker checks for what would waste the pass: no budget left, no
        room on the disk and, with DP-SGD, a task that fails.

        Raises:
            BudgetSpentError: it would exceed the privacy budget; nothing was trained.
            OldAccountError: the privacy account does not know what was spent since a backup; nothing was trained.
            LocalStorageError: it could not be booked in the privacy account, or the disk has no room for its update;
                nothing was trained.
            HospitalError: the task fails.
            LocalDataError: the loss or the result is not finite.
        """
        self._make_as(manifest)
        self._pass = None
        n_made = self._outbox.n_made()
        seed = _seed(manifest.seed, self._settings.site, manifest.version, n_made)
        sample_rate = self._trainer.sample_rate(manifest.training)
        self._guard.catch_up(manifest, sample_rate, self._left(manifest))
        self._guard.check_pass(manifest, sample_rate, self._layout)
        self._check_room(manifest)
        with self._start(manifest.version, goes_on=goes_on) as start, task_code("training"):
            self._rehearse(manifest, start, n_made)
            self._guard.charge_pass(manifest, sample_rate, n_made, self._outbox.next_sequence())
            trained = self._trainer.train(start, manifest.training, seed)
            delta = self._model.delta(start)
            _refuse_not_finite(delta)
            norm = float(np.sqrt(sum(float(np.square(delta[block]).sum()) for block in blocks(len(delta)))))
        dp_sgd = manifest.training.dp is not None
        self._pass = Pass(manifest.version, seed, trained.n_samples, goes_on, dp_sgd)
        return Trained(trained.n_samples, trained.train_loss, norm)

    def _left(self, manifest: ModelManifest) -> Left:
        """Return the newest update that may have left this site at a cost in privacy, for `Guard.catch_up`."""
        charged, found = self._outbox.newest_charged(), self._outbox.restored()
        if found is None or found.cost_nothing or charged >= found.first:
            return Left(charged)
        if not self._guard.concerns(manifest):
            self._outbox.note_cost_nothing(manifest.opening.first_version)
        partly_sent = found.known + 1
        return Left(max(partly_sent, charged), signed=found.signed >= found.known)

    def _rehearse(self, manifest: ModelManifest, start: Vector, n_made: int) -> None:
        """Rehearse DP-SGD on one batch, or on every case if a charged pass became no update."""
        training = manifest.training
        lost = self._guard.n_unfinished(manifest, n_made)
        if training.dp is not None and (lost or training != self._rehearsed):
            self._trainer.rehearse(start, training, whole=lost > 0)
            self._rehearsed = training

    def _check_room(self, manifest: ModelManifest) -> None:
        n = self._layout.n_parameters
        with local_disk(self._settings.state_dir):
            self._outbox.check_room(scheme.update_bytes(manifest.delta, n) + n * OUTBOX_BYTES)

    def spending(self, manifest: ModelManifest) -> Spending | None:
        """Return what was spent of this hospital's privacy budget; None if nothing is booked in such a run."""
        return self._guard.spending(manifest)

    def encode(self, newest: ModelManifest) -> Update:
        """Quantise the delta on the newest grid, encrypt it and store it with the residual that rounding left.

        Raises:
            BudgetSpentError: the noise on this grid would exceed the privacy budget.
            LocalStorageError: the disk is full; nothing of the update counts, and the pass is kept to be encoded again.
            LocalDataError: nothing was trained, or the worker process that trained has ended.
        """
        done = self._pass
        if done is None:
            raise LocalDataError("nothing was trained since the worker started")
        with local_disk(self._settings.state_dir):
            with self._start(done.version, goes_on=done.goes_on) as start:
                update = self._encode(done, self._model.delta(start), newest)
            if done.goes_on:
                self._note_local(done.version)
        self._pass = None
        return_free_memory()
        return update

    def _encode(self, done: "Pass", delta: Vector, newest: ModelManifest) -> Update:
        encode = encoder(newest.delta, held(self._keys, newest.key_id))
        self._check_room(newest)
        sequence, dropped = self._outbox.next_sequence(), self._outbox.begin(self._settings.max_outbox)
        update_id = uuid.uuid4().hex
        rng = np.random.default_rng(done.seed)
        residual = self._outbox.residual(self._layout, dropped)
        digests = []
        n_bytes = 0
        saturated = 0
        rounding = None if newest.delta.dp is None else SkellamRounding(newest.delta.dp, delta, residual)
        chunks = encode.encode(delta, residual, self._layout, newest.grid, rng, rounding)
        done.booked = self._guard.charge_update(newest, self._layout, sequence, dp_sgd=done.dp_sgd, booked=done.booked)
        spending = self._guard.spending(newest)
        for position, chunk in enumerate(chunks):
            key = ChunkKey(update_id, sequence, position, chunk.start)
            self._outbox.add_chunk(key, chunk.data, chunk.values, chunk.residual)
            digests.append(wire.digest(chunk.data))
            n_bytes += len(chunk.data)
            saturated += chunk.n_saturated
        update = Update(
            run=self._settings.run,
            region=self._settings.region,
            site=self._settings.site,
            update_id=update_id,
            sequence=sequence,
            base_version=done.version,
            grid_id=newest.grid.grid_id,
            key_id=encode.key_id,
            n_samples=done.n_samples,
            saturated=saturated,
            min_sites=self._policy.min_sites,
            payload=Payload(payload_id=update_id, n_bytes=n_bytes, digests=tuple(digests)),
        )
        self._outbox.add_update(update, newest.grid.steps, dropped, None if spending is None else spending.epsilon)
        return update

    def _take(self, model: nn.Module) -> None:
        self._model = FlatModel(model)
        self._layout = Layout(parameters_of(model))
        self._frozen = list(frozen_of(model))
        self._frozen_digests = frozen_digests(model)

    def _make_as(self, manifest: ModelManifest) -> None:
        """Make the model for the run's seed, and check that its frozen tensors equal the coordinator's.

        Raises:
            RefusedError: ``wrong_shape``: a frozen tensor differs; the text names it.
        """
        if manifest.seed != self._seed:
            with task_code("making the model"):
                model = initial_model(self._task, manifest.seed)
                self._trainer.lend(model)
                self._evaluator.lend(model)
            self._take(model)
            self._seed, self._pass = manifest.seed, None
        if differs := unlike(self._frozen, self._frozen_digests, manifest.frozen_digests):
            raise RefusedError(
                Reason.WRONG_SHAPE,
                f"{differs} from the coordinator's: does model() load the same file of weights? What it computes, on"
                " another processor, may differ in the last digit: register it with persistent=False",
            )

    def _start(self, version: int, *, goes_on: bool) -> TensorFile:
        """Open the weights that a pass on ``version`` starts from."""
        if goes_on and self._local.exists():
            local = read_or_drop(self._local)
            if local.metadata.get("version") == str(version):
                return local
            local.close()
        return self._weights.weights(version)

    def _note_local(self, version: int) -> None:
        partial = self._local.with_suffix(".partial")
        with TensorFile.create(partial, [("local", (len(self._model),))], {"version": str(version)}) as file:
            for block in blocks(len(self._model)):
                file.write(block.start, self._model[block])
        partial.rename(self._local)


def _refuse_not_finite(delta: Vector) -> None:
    for block in blocks(len(delta)):
        if not np.isfinite(delta[block]).all():
            raise LocalDataError("training made a weight that is not finite; lower the learning rate?")


def return_free_memory() -> None:
    """Return the memory that encoding freed to the system, before training needs more. Does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _seed(seed: int, site: str, version: int, n_made: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{site}/{version}/{n_made + 1}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def _difference(announced: Sequence[ParameterSpec], own: Sequence[ParameterSpec]) -> str:
    """Describe the first difference between the tensors that a manifest announces and this site's ``own``."""
    known = {spec.name: spec for spec in own}
    for spec in announced:
        if spec.name not in known:
            return f"{spec.name} {spec.shape} does not travel from this site; is it frozen here, or absent?"
        if known[spec.name].shape != spec.shape:
            return f"{spec.name} is {spec.shape} in the manifest, {known[spec.name].shape} in the task"
    names = {spec.name for spec in announced}
    for spec in own:
        if spec.name not in names:
            return f"{spec.name} {spec.shape} travels from this site only; is it frozen at the coordinator, or absent?"
    first, second = next((one, other) for one, other in zip(announced, own, strict=True) if one != other)
    return f"{first.name} is where {second.name} is here; model() must make its layers in the same order everywhere"
