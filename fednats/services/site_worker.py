"""What a site does in its worker process: load data, train, evaluate, encode into the outbox."""

import hashlib
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fednats import wire
from fednats.codec.layout import Layout
from fednats.config import SiteSettings
from fednats.delta.encode import encoder
from fednats.errors import FednatsError, LocalDataError, Reason, RefusedError, TaskError
from fednats.learning.evaluation import Evaluated, Evaluator
from fednats.learning.flat import parameters_of
from fednats.learning.task import make_task
from fednats.learning.trainer import LocalResult, Trainer
from fednats.messages import ModelManifest, Payload, Update
from fednats.services.keys import key_id_of, read_key
from fednats.storage.outbox import Outbox


@dataclass(frozen=True)
class Trained:
    """What the daemon may log of a local pass."""

    n_samples: int
    train_loss: float


class SiteWorker:
    """Holds task, data and model; the update of the last local pass until it is encoded."""

    def __init__(self, settings: SiteSettings) -> None:
        torch.set_num_threads(1)
        self._settings = settings
        self._public_key = read_key(settings.public_key_file, "public_key_file")
        with task_code("loading the task"):
            task = make_task(settings.task.path, settings.task.options)
            self._parameters = parameters_of(task.model())
            self._trainer = Trainer(task)
            self._evaluator = Evaluator(task)
        self._layout = Layout(self._parameters)
        self._outbox = Outbox(outbox_file(settings.state_dir))
        self._result: LocalResult | None = None

    def prepare(self) -> int:
        """Load everything; return the number of training cases."""
        return self._trainer.n_samples

    def check(self, manifest: ModelManifest) -> None:
        """Refuse a manifest that is not of this site's task or key.

        Raises:
            RefusedError: the parameters, the cipher's key or the grid do not fit.
        """
        if manifest.parameters != self._parameters:
            detail = _difference(manifest, {spec.name: spec.shape for spec in self._parameters})
            raise RefusedError(Reason.WRONG_SHAPE, f"the announced model is not this site's: {detail}")
        if self._public_key is not None and manifest.delta.cipher == "none":
            raise RefusedError(Reason.POLICY, "the run is not encrypted, but this site has a public_key_file")
        key_id = key_id_of(lambda: encoder(manifest.delta, self._public_key).key_id)
        if manifest.key_id != key_id:
            raise RefusedError(Reason.WRONG_KEY, f"announced for key {manifest.key_id}, public_key_file holds {key_id}")
        if len(manifest.grid.steps) != len(manifest.parameters):
            raise RefusedError(
                Reason.WRONG_GRID, f"{len(manifest.grid.steps)} steps for {len(manifest.parameters)} tensors"
            )

    def evaluate(self, weights: bytes) -> Evaluated:
        """Evaluate float32 weights on the test data."""
        with task_code("evaluating"):
            return self._evaluator.evaluate(np.frombuffer(weights, "<f4"))

    def train(self, manifest: ModelManifest, weights: bytes) -> Trained:
        """Make one local pass from float32 weights; the delta stays here until `encode`."""
        seed = _seed(manifest.seed, self._settings.site, manifest.version)
        with task_code("training"):
            self._result = self._trainer.train(np.frombuffer(weights, "<f4"), manifest.training, seed)
        return Trained(self._result.n_samples, self._result.train_loss)

    def encode(self, base_version: int, newest: ModelManifest) -> Update:
        """Quantise on the newest grid, encrypt and store the delta with what rounding left of it."""
        result = self._result
        if result is None:
            raise LocalDataError("nothing was trained since the worker started")
        encode = encoder(newest.delta, self._public_key)
        sequence = self._outbox.next_sequence()
        update_id = uuid.uuid4().hex
        rng = np.random.default_rng(_seed(newest.seed, self._settings.site, base_version) + sequence)
        digests = []
        n_bytes = 0
        saturated = 0
        chunks = encode.encode(result.delta, self._outbox.residual, self._layout, newest.grid, rng)
        for position, chunk in enumerate(chunks):
            self._outbox.add_chunk(update_id, position, chunk.data)
            self._outbox.add_residual(sequence, chunk.start, chunk.residual)
            digests.append(wire.digest(chunk.data))
            n_bytes += len(chunk.data)
            saturated += chunk.n_saturated
        update = Update(
            run=self._settings.run,
            region=self._settings.region,
            site=self._settings.site,
            update_id=update_id,
            sequence=sequence,
            base_version=base_version,
            grid_id=newest.grid.grid_id,
            key_id=encode.key_id,
            n_samples=result.n_samples,
            saturated=saturated,
            payload=Payload(payload_id=update_id, n_bytes=n_bytes, digests=tuple(digests)),
        )
        self._outbox.add_update(update)
        self._result = None
        return update


@contextmanager
def task_code(doing: str) -> Iterator[None]:
    """Turn whatever a hospital's own code raises into a TaskError that names the place and quotes no data.

    Messages of exceptions may hold the value that could not be read, so only those of the operating system, which name
    files, are passed on.
    """
    try:
        yield
    except FednatsError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever foreign code raises, told on as one error
        text = f": {error}" if isinstance(error, OSError) else ""
        frames = traceback.extract_tb(error.__traceback__)
        own = next((frame for frame in reversed(frames) if "site-packages" not in frame.filename), frames[-1])
        raise TaskError(
            f"{doing} failed: {type(error).__name__}{text} (in {own.name}, {own.filename} line {own.lineno})"
        ) from None


def outbox_file(state_dir: Path) -> Path:
    """Return where a site keeps its outbox."""
    return state_dir / "outbox.sqlite"


def _seed(seed: int, site: str, version: int) -> int:
    digest = hashlib.blake2b(f"{seed}/{site}/{version}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")


def _difference(manifest: ModelManifest, own: Mapping[str, tuple[int, ...]]) -> str:
    for spec in manifest.parameters:
        if own.get(spec.name) != spec.shape:
            return f"{spec.name} is {spec.shape} in the manifest, {own.get(spec.name, 'absent')} in the task"
    return f"{len(manifest.parameters)} tensors in the manifest, {len(own)} in the task"
