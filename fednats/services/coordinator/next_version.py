"""Make the next model version on disk, in two passes over the files of the current one, block by block."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fednats import wire
from fednats.codec import frames
from fednats.codec.layout import Difference, Layout, Vector, blocks
from fednats.config import RunSettings
from fednats.crypto import sealing
from fednats.crypto.sealing import ModelKeys
from fednats.learning.server_optimizer import ServerOptimizer
from fednats.messages import DIGEST_BYTES, Chunk, Frame, Grid, Opening
from fednats.storage.checkpoints import Checkpoint, Checkpoints
from fednats.storage.chunk_file import ChunkFile
from fednats.storage.tensor_file import TensorFile

KEYFRAME_AFTER = 2.0
"""A keyframe is due when the differences since the last one exceed this many times its bytes."""

LONGEST_CHAIN = 16
"""Differences after which a keyframe is due, whatever their size; twice that number are kept for sites that lag."""

FRAMES_SHARE = 0.5
"""Share of the largest message for the frames in a manifest; the rest is for parameters, grid and settings."""

_LISTED_DIGEST_BYTES = DIGEST_BYTES + 2
_LISTED_STEP_BYTES = 9
_LISTED_FRAME_BYTES = 128


@dataclass(frozen=True)
class Provenance:
    """The sums that a version was made of."""

    combination_id: str
    norms: dict[str, float] = field(default_factory=dict)
    """L2 norms of all sums that arrived for it, by id."""
    quarantined: dict[str, str] = field(default_factory=dict)
    """Reason for each sum that was left out, by id."""


Check = Callable[[int, NDArray[np.float32]], None]
"""Called with an index into the flat vector and values from there on. Raises RefusedError if no model can hold them."""


@contextmanager
def _closing_on_error(*files: TensorFile) -> Iterator[None]:
    try:
        yield
    except BaseException:
        for file in files:
            file.close()
        raise


class NextVersion:
    """Makes the version after ``current``."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        keys: ModelKeys,
        current: Checkpoint,
        layout: Layout,
        chunk_bytes: int,
        max_message_bytes: int,
        check: Check,
    ) -> None:
        self._checkpoints = checkpoints
        self._keys = keys
        self._current = current
        self._layout = layout
        self._chunk_bytes = chunk_bytes
        self._max_message_bytes = max_message_bytes
        self._check = check

    def make(
        self, optimizer: ServerOptimizer, mean_delta: NDArray[np.float32], made: Provenance, grids: tuple[Grid, ...]
    ) -> Checkpoint:
        """Step along ``mean_delta`` float32[n], round the difference, commit; durable on return.

        Raises:
            RefusedError: ``check`` refuses the result; nothing was committed.
        """
        version, made_by = self._current.version + 1, made.combination_id
        weights, state = self._checkpoints.create(version)
        with (
            _closing_on_error(weights, state),
            self._checkpoints.weights(self._current.version) as published,
            self._checkpoints.state(self._current.version) as state_before,
        ):
            self._step(optimizer, mean_delta, state_before, state)
            steps = frames.steps(self._layout.means(Difference(state, published), np.square))
            difference, digest = self._round(state, published, steps, weights, f"v{version}-{made_by[:8]}")
        kept = (*self._current.frames, difference)
        if _keyframe_is_due(kept, self._max_message_bytes) or self._key_is_new():
            kept = (
                *kept,
                write_keyframe(
                    self._checkpoints, self._keys, weights, version, f"k{version}-{made_by[:8]}", self._chunk_bytes
                ),
            )
        checkpoint = Checkpoint(
            version=version,
            opening=self._current.opening,
            settings=self._current.settings,
            n_steps=self._current.n_steps + 1,
            made_by=made_by,
            weights_digest=digest,
            frozen_digests=self._current.frozen_digests,
            grids=grids,
            frames=still_of_use(kept, self._max_message_bytes),
            norms=made.norms,
            quarantined=made.quarantined,
        )
        self._checkpoints.commit(checkpoint, weights, state)
        return checkpoint

    def _key_is_new(self) -> bool:
        """Whether the newest keyframe is sealed with an older key, so the newest key alone cannot open it."""
        keyframe = next(frame for frame in reversed(self._current.frames) if frame.is_keyframe)
        sealed = next(self._checkpoints.frame(keyframe.payload.payload_id))
        return sealing.sealing_key_id(sealed) != self._keys.newest

    def _step(
        self, optimizer: ServerOptimizer, mean_delta: NDArray[np.float32], before: TensorFile, after: TensorFile
    ) -> None:
        n = self._layout.n_parameters
        for block in blocks(n):
            slots = {
                name: before[position * n + block.start : position * n + block.stop]
                for position, name in enumerate(optimizer.slots, 1)
            }
            statistics = self._layout.of_statistics(block.start, block.stop)
            stepped, slots = optimizer.step(
                before[block], slots, mean_delta[block], self._current.n_steps, statistics=statistics
            )
            self._check(block.start, stepped)
            after.write(block.start, stepped)
            for position, name in enumerate(optimizer.slots, 1):
                after.write(position * n + block.start, slots[name])

    def _round(
        self, target: TensorFile, published: TensorFile, steps: tuple[float, ...], weights: TensorFile, payload_id: str
    ) -> tuple[Frame, bytes]:
        digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
        with self._checkpoints.create_frame(payload_id) as file:
            for position, part in enumerate(blocks(self._layout.n_parameters, self._chunk_bytes)):
                base = published[part]
                of_values = self._layout.steps(steps, part.start, part.stop)
                multiples = frames.difference(target[part], base, of_values)
                reached = frames.follow(base, multiples, of_values)
                self._check(part.start, reached)
                weights.write(part.start, reached)
                digest.update(reached.tobytes())
                _append(file, self._keys, payload_id, position, multiples.tobytes())
        frame = Frame(version=self._current.version + 1, steps=steps, payload=file.payload(payload_id))
        return frame, digest.digest()


@dataclass(frozen=True)
class Start:
    """What the first version of an opening is made of."""

    opening: Opening
    settings: RunSettings
    grids: tuple[Grid, ...]
    weights: Vector
    """float32[n_parameters]"""
    frozen_digests: bytes
    state: Vector | None = None
    """The optimiser's state to continue with: ``target``, then its slots. None for a fresh one."""
    n_steps: int = 0


def first_version(checkpoints: Checkpoints, keys: ModelKeys, start: Start, chunk_bytes: int) -> Checkpoint:
    """Commit the first version of an opening, a keyframe; durable on return."""
    version = start.opening.opened_at
    weights, state = checkpoints.create(version)
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for block in blocks(len(start.weights)):
        values = start.weights[block]
        weights.write(block.start, values)
        state.write(block.start, values)
        digest.update(values.tobytes())
    if start.state is not None:
        for block in blocks(len(start.state)):
            state.write(block.start, start.state[block])
    keyframe = write_keyframe(checkpoints, keys, weights, version, f"k{version}-first", chunk_bytes)
    checkpoint = Checkpoint(
        version=version,
        opening=start.opening,
        settings=start.settings,
        n_steps=start.n_steps,
        made_by="",
        weights_digest=digest.digest(),
        frozen_digests=start.frozen_digests,
        grids=start.grids,
        frames=(keyframe,),
    )
    checkpoints.commit(checkpoint, weights, state)
    return checkpoint


def write_keyframe(
    checkpoints: Checkpoints, keys: ModelKeys, weights: Vector, version: int, payload_id: str, chunk_bytes: int
) -> Frame:
    """Write all of ``weights`` as a frame."""
    with checkpoints.create_frame(payload_id) as file:
        for position, part in enumerate(blocks(len(weights), chunk_bytes // frames.VALUE_BYTES)):
            _append(file, keys, payload_id, position, weights[part].tobytes())
    return Frame(version=version, steps=(), payload=file.payload(payload_id))


def _append(file: ChunkFile, keys: ModelKeys, payload_id: str, position: int, values: bytes) -> None:
    """Write a chunk sealed, as it will be published. Publishing again after a restart reads this file."""
    file.append(keys.seal(payload_id, position, wire.pack(Chunk(parts=(values,)))))


def _keyframe_is_due(kept: Sequence[Frame], max_message_bytes: int) -> bool:
    keyframe, *since = _newest_chain(kept)
    n_bytes = sum(frame.payload.n_bytes for frame in since)
    return (
        n_bytes > KEYFRAME_AFTER * keyframe.payload.n_bytes
        or len(since) >= LONGEST_CHAIN
        or not _fit((keyframe, *since), max_message_bytes)
    )


def still_of_use(kept: Sequence[Frame], max_message_bytes: int) -> tuple[Frame, ...]:
    """Keep the newest differences and the two newest keyframes: a site may have half fetched one when the next comes.

    Keep fewer if the manifest would otherwise be too large for a message, but always the newest chain.
    """
    keyframes = [frame for frame in kept if frame.is_keyframe][-2:]
    differences = [frame for frame in kept if not frame.is_keyframe][-2 * LONGEST_CHAIN :]
    useful = [frame for frame in kept if frame in keyframes or frame in differences]
    while len(useful) > len(_newest_chain(useful)) and not _fit(useful, max_message_bytes):
        del useful[0]
    return tuple(useful)


def _newest_chain(kept: Sequence[Frame]) -> Sequence[Frame]:
    """Return the newest keyframe and the differences after it."""
    return kept[max(index for index, frame in enumerate(kept) if frame.is_keyframe) :]


def _fit(listed: Sequence[Frame], max_message_bytes: int) -> bool:
    n_bytes = sum(
        _LISTED_FRAME_BYTES + _LISTED_DIGEST_BYTES * len(frame.payload.digests) + _LISTED_STEP_BYTES * len(frame.steps)
        for frame in listed
    )
    return n_bytes <= FRAMES_SHARE * max_message_bytes
