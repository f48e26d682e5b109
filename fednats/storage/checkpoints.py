"""Model versions on disk: weights, the server optimiser's state and frames. A version is stored whole or not at all."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgpack
from pydantic import BaseModel, ConfigDict

from fednats.config import RunSettings
from fednats.errors import ConfigError, RefusedError
from fednats.messages import Frame, Grid, Opening, ParameterSpec
from fednats.storage.chunk_file import ChunkFile, read_chunks
from fednats.storage.tensor_file import TensorFile, sync_folder
from fednats.wire import unpack_values

KEPT_VERSIONS = 8
"""Number of newest versions kept. Evaluations that show a version to be the best arrive a few versions later."""

BEST_FILE = "best.safetensors"


class Checkpoint(BaseModel):
    """One model version, without its tensors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    opening: Opening
    """The version's run."""
    settings: RunSettings
    """Settings of that run."""
    n_steps: int
    """Steps that the run's optimiser has made."""
    made_by: str
    """Id of the combination that made this version; empty for the first version of an opening."""
    weights_digest: bytes
    frozen_digests: bytes
    """Digests of the tensors that do not travel, as announced in the manifests."""
    grids: tuple[Grid, ...]
    """Grids of contributions that may still be on their way; the last is the current one."""
    frames: tuple[Frame, ...]
    """Published frames, whose chunks are on disk too."""
    norms: dict[str, float] = {}
    """L2 norms of the sums that arrived for this version, by id."""
    quarantined: dict[str, str] = {}
    """The sums that were left out, by id, each with the reason."""


class Checkpoints:
    """A folder of versions.

    ``version-<n>.safetensors`` holds the weights as published, tensor by tensor. ``optimizer-<n>.safetensors``, for the
    newest version only, holds ``target`` (the optimiser's own weights, before rounding) and its slots, each
    float32[n_parameters]. ``version-<n>.msgpack`` holds the rest; a version exists once this file does.
    """

    def __init__(self, directory: Path, parameters: Sequence[ParameterSpec], slots: Sequence[str]) -> None:
        self._directory = directory
        self._parameters = [(spec.name, spec.shape) for spec in parameters]
        self._state_names = ("target", *slots)
        directory.mkdir(parents=True, exist_ok=True)

    def create(self, version: int) -> tuple[TensorFile, TensorFile]:
        """Create the files for the weights and the optimiser's state of a new version, filled with zeros."""
        weights = TensorFile.create(
            _partial(weights_file(self._directory, version)), self._parameters, {"version": str(version)}
        )
        shapes = [(name, (len(weights),)) for name in self._state_names]
        return weights, TensorFile.create(_partial(self._state_file(version)), shapes, {"version": str(version)})

    def create_frame(self, payload_id: str) -> ChunkFile:
        """Begin the chunk file of a frame."""
        path = frame_file(self._directory, payload_id)
        path.unlink(missing_ok=True)
        return ChunkFile(path)

    def frame(self, payload_id: str) -> Iterator[bytes]:
        """Yield the chunks of a frame."""
        return read_chunks(frame_file(self._directory, payload_id))

    def commit(self, checkpoint: Checkpoint, weights: TensorFile, state: TensorFile) -> None:
        """Close the files of a version and make it the newest; durable on return. Removes files no longer needed."""
        files = {
            weights: weights_file(self._directory, checkpoint.version),
            state: self._state_file(checkpoint.version),
        }
        for file, path in files.items():
            file.sync()
            file.close()
            file.path.rename(path)
        record = self._record(checkpoint.version)
        with _partial(record).open("wb") as file_of_record:
            file_of_record.write(msgpack.packb(checkpoint.model_dump()))
            file_of_record.flush()
            os.fsync(file_of_record.fileno())
        sync_folder(self._directory)
        _partial(record).rename(record)
        sync_folder(self._directory)
        self._tidy(checkpoint)

    def newest(self) -> Checkpoint | None:
        """Return the newest version, or None before the first. Raises as `newest_checkpoint`."""
        return newest_checkpoint(self._directory)

    def weights(self, version: int) -> TensorFile:
        """Open the weights of ``version``. Raises ConfigError if they are missing, damaged or another model's."""
        file = TensorFile.read(weights_file(self._directory, version))
        if file.tensors != self._parameters:
            file.close()
            raise ConfigError(
                f"{self._directory}: holds another model than the task's: {_unlike(file.tensors, self._parameters)};"
                " restore the task, or give another one kits and a state_dir of its own"
            )
        return file

    def state(self, version: int) -> TensorFile:
        """Open the optimiser's state at ``version``, which must be the newest: ``target``, then each slot.

        Raises:
            ConfigError: the state is missing, damaged or another optimiser's.
        """
        file = TensorFile.read(self._state_file(version))
        n_parameters = sum(math.prod(shape) for _, shape in self._parameters)
        if len(file) != len(self._state_names) * n_parameters:
            file.close()
            raise ConfigError(
                f"{self._state_file(version)} is the state of another server optimiser; restore the settings [server]"
            )
        return file

    def has(self, version: int) -> bool:
        """Whether ``version`` is still among the versions kept."""
        return weights_file(self._directory, version).exists()

    @property
    def best_file(self) -> Path:
        """File with the weights of the run's best version."""
        return self._directory / BEST_FILE

    def keep_run(self, last: Checkpoint) -> Path:
        """Move the best version of a finished run to ``runs/NAME``; return the path for that run's last version."""
        folder = self._directory / "runs" / last.opening.name
        folder.mkdir(parents=True, exist_ok=True)
        if self.best_file.exists():
            self.best_file.rename(folder / BEST_FILE)
        return folder / "last.safetensors"

    def _tidy(self, newest: Checkpoint) -> None:
        old = sorted(_versions(self._directory))[:-KEPT_VERSIONS]
        frames = {frame_file(self._directory, frame.payload.payload_id) for frame in newest.frames}
        unneeded = [file for version in old for file in (self._record(version), weights_file(self._directory, version))]
        unneeded += [file for file in self._directory.glob("frame-*.chunks") if file not in frames]
        unneeded += [
            file for file in self._directory.glob("optimizer-*.safetensors") if file != self._state_file(newest.version)
        ]
        for file in unneeded:
            file.unlink(missing_ok=True)

    def _record(self, version: int) -> Path:
        return self._directory / f"version-{version}.msgpack"

    def _state_file(self, version: int) -> Path:
        return self._directory / f"optimizer-{version}.safetensors"


def checkpoints_folder(state_dir: Path) -> Path:
    """Return the folder of a coordinator's versions."""
    return state_dir / "checkpoints"


def frame_file(directory: Path, payload_id: str) -> Path:
    """Return the file with the chunks of a frame."""
    return directory / f"frame-{payload_id}.chunks"


def newest_checkpoint(directory: Path) -> Checkpoint | None:
    """Return the newest version in ``directory``, or None before the first.

    Raises:
        ConfigError: its record is damaged.
    """
    versions = _versions(directory)
    if not versions:
        return None
    path = directory / f"version-{max(versions)}.msgpack"
    try:
        return Checkpoint.model_validate(unpack_values(path.read_bytes()))
    except (OSError, ValueError, RefusedError) as error:  # pydantic's errors are ValueErrors
        raise ConfigError(f"{path}: cannot be read as a checkpoint ({error}); restore it or remove it") from error


def weights_file(directory: Path, version: int) -> Path:
    """Return the file with the weights of ``version``."""
    return directory / f"version-{version}.safetensors"


def _versions(directory: Path) -> list[int]:
    numbers = (path.stem.removeprefix("version-") for path in directory.glob("version-*.msgpack"))
    return [int(number) for number in numbers if number.isdecimal()]


def _unlike(stored: Sequence[tuple[str, tuple[int, ...]]], own: Sequence[tuple[str, tuple[int, ...]]]) -> str:
    """Describe how the tensors ``stored`` differ from the task's ``own``."""
    for (name, shape), (own_name, own_shape) in zip(stored, own, strict=False):
        if (name, shape) != (own_name, own_shape):
            return f"{name} {shape} where the task has {own_name} {own_shape}"
    return f"{len(stored)} tensors, the task has {len(own)}"


def _partial(path: Path) -> Path:
    return path.with_name(f"partial-{path.name}")
