"""A site's copy of a model version on disk, and the frames fetched on the way to the next one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fednats import wire
from fednats.codec import frames
from fednats.codec.layout import Layout, blocks
from fednats.config import MIN_CHUNK_BYTES
from fednats.crypto.sealing import ModelKeys
from fednats.errors import ConfigError, LocalStorageError, Reason, RefusedError
from fednats.messages import Chunk, Frame, ModelManifest
from fednats.storage.chunk_file import read_chunks
from fednats.storage.tensor_file import TensorFile, digest_of


class LocalModel:
    """A folder with one version, ``version-<n>.safetensors``, and frames, ``frame-<payload id>.chunks``.

    The daemon fetches frames and stores them sealed; the worker opens and applies them.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    @property
    def held(self) -> int:
        """The version whose weights are here; -1 for none."""
        return max((int(path.stem.removeprefix("version-")) for path in self._directory.glob("version-*")), default=-1)

    def frame_file(self, frame: Frame) -> Path:
        """Return the file for the chunks of ``frame``."""
        return self._directory / f"frame-{frame.payload.payload_id}.chunks"

    def fetched(self) -> dict[str, int]:
        """Return the number of bytes fetched so far, by payload id."""
        files = self._directory.glob("frame-*.chunks")
        return {path.stem.removeprefix("frame-"): path.stat().st_size for path in files}

    def weights(self, version: int) -> TensorFile:
        """Open the weights of ``version``. Raises as `read_or_drop`; the weights are then fetched again."""
        return read_or_drop(self._file(version))

    @staticmethod
    def check(frame: Frame, n_parameters: int) -> None:
        """Refuse to fetch a frame that is larger than a model of ``n_parameters`` needs.

        Raises:
            RefusedError: ``oversized``.
        """
        n_values = frames.VALUE_BYTES * n_parameters if frame.is_keyframe else n_parameters
        n_chunks = -(-n_values // MIN_CHUNK_BYTES)
        most = n_values + n_chunks * wire.ROOM_BYTES
        if len(frame.payload.digests) > max(n_chunks, 1) or frame.payload.n_bytes > most:
            raise RefusedError(
                Reason.OVERSIZED,
                f"frame {frame.payload.payload_id} of {frame.payload.n_bytes} bytes in {len(frame.payload.digests)} chunks,"
                f" the model needs {most} in {n_chunks} at most",
            )

    def advance(self, manifest: ModelManifest, chain: Sequence[Frame], keys: ModelKeys) -> None:
        """Make the weights of ``manifest`` from the version held, along ``chain``, whose frames have been fetched.

        Raises:
            LocalStorageError: the version held is damaged; it is removed.
            RefusedError: the frames are malformed or not sealed with one of ``keys``, or the result does not have the
                announced digest. Everything fetched is then removed, so that the next attempt starts from a keyframe.
        """
        held = self.held
        layout = Layout(manifest.parameters)
        partial = self._directory / "next.partial"
        try:
            with TensorFile.create(partial, [(spec.name, spec.shape) for spec in manifest.parameters], {}) as made:
                if not chain[0].is_keyframe:
                    _copy(self.weights(held), made)
                for frame in chain:
                    follow_frame(self.frame_file(frame), frame, layout, made, keys)
                made.sync()
                digest = digest_of(made)
        except RefusedError:
            self._forget()
            raise
        if digest != manifest.weights_digest:
            self._forget()
            raise RefusedError(Reason.CHECKSUM, f"version {manifest.version} differs from its digest")
        partial.rename(self._file(manifest.version))
        self._forget(but=self._file(manifest.version))

    def _forget(self, but: Path | None = None) -> None:
        for path in [*self._directory.glob("frame-*.chunks"), *self._directory.glob("version-*.safetensors")]:
            if path != but:
                path.unlink()

    def _file(self, version: int) -> Path:
        return self._directory / f"version-{version}.safetensors"


def model_folder(state_dir: Path) -> Path:
    """Return the folder of a site's copy of the model."""
    return state_dir / "model"


def read_or_drop(path: Path) -> TensorFile:
    """Open a file that can be obtained again.

    Raises:
        LocalStorageError: the file is missing or damaged. It is removed, so that the next attempt does without it.
    """
    try:
        return TensorFile.read(path)
    except ConfigError as error:
        path.unlink(missing_ok=True)
        raise LocalStorageError(
            f"{path}: cannot be read as a model ({error.__cause__}); it was removed, and the next attempt makes it anew"
        ) from error


def follow_frame(path: Path, frame: Frame, layout: Layout, made: TensorFile, keys: ModelKeys) -> None:
    """Bring ``made`` to the version of ``frame``, whose chunks are at ``path``. A difference needs the one before.

    Raises:
        RefusedError: the frame is malformed, or not sealed with one of ``keys``.
    """
    start = 0
    for position, sealed in enumerate(read_chunks(path)):
        part = _only_part(keys.opened(frame.payload.payload_id, position, sealed))
        stop = start + len(part) // (frames.VALUE_BYTES if frame.is_keyframe else 1)
        if stop > layout.n_parameters or (frame.is_keyframe and len(part) % frames.VALUE_BYTES):
            raise RefusedError(Reason.WRONG_SHAPE, f"frame {frame.payload.payload_id}: too many values")
        if frame.is_keyframe:
            made.write(start, np.frombuffer(part, "<f4"))
        else:
            steps = layout.steps(frame.steps, start, stop)
            made.write(start, frames.follow(made[start:stop], np.frombuffer(part, np.int8), steps))
        start = stop
    if start != layout.n_parameters:
        raise RefusedError(
            Reason.WRONG_SHAPE, f"frame {frame.payload.payload_id}: {start} of {layout.n_parameters} values"
        )


def _only_part(data: bytes) -> bytes:
    parts = wire.unpack(data, Chunk).parts
    if len(parts) != 1:
        raise RefusedError(Reason.MALFORMED, f"a chunk of a frame in {len(parts)} parts, expected one")
    return parts[0]


def _copy(source: TensorFile, target: TensorFile) -> None:
    with source:
        for block in blocks(len(source)):
            target.write(block.start, source[block])
