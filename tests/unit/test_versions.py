"""Versions from the coordinator's files to a site's: keyframes, differences, the same bits at both ends."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file
from torch import nn

from fednats import wire
from fednats.codec import frames, grid
from fednats.codec.layout import Layout
from fednats.config import AggregationSettings, DeltaSettings, RunSettings, ServerSettings, TrainingSettings
from fednats.crypto.sealing import ModelKeys, generate
from fednats.errors import ConfigError, LocalStorageError, Reason, RefusedError
from fednats.learning.flat import FlatModel
from fednats.learning.server_optimizer import ServerOptimizer
from fednats.messages import Frame, ModelManifest, ParameterSpec, Payload
from fednats.services.coordinator.next_version import (
    LONGEST_CHAIN,
    Check,
    NextVersion,
    Provenance,
    Start,
    first_version,
)
from fednats.storage.checkpoints import KEPT_VERSIONS, Checkpoint, Checkpoints, frame_file, weights_file
from fednats.storage.chunk_file import ChunkFile, keep_sound, read_chunks
from fednats.storage.local_model import LocalModel
from fednats.storage.tensor_file import TensorFile
from tests.makers import FIRST

PARAMETERS = (ParameterSpec(name="weight", shape=(100, 70)), ParameterSpec(name="bias", shape=(70,)))
LAYOUT = Layout(PARAMETERS)
CHUNK_BYTES = 4096
N = LAYOUT.n_parameters
SECRET = generate()
KEYS = ModelKeys([SECRET], "r")


class Origin:
    """A coordinator's folder of versions."""

    def __init__(self, directory: Path, settings: ServerSettings | None = None, max_message_bytes: int = 2**20) -> None:
        self.directory = directory
        self.max_message_bytes = max_message_bytes
        self.check: Check = FlatModel(nn.Linear(100, 70)).hollow().check
        self.keys = KEYS
        self.optimizer = ServerOptimizer(settings or ServerSettings())
        self.checkpoints = Checkpoints(directory, PARAMETERS, self.optimizer.slots)
        self.rng = np.random.default_rng(0)
        weights = self.rng.normal(size=N).astype(np.float32)
        self.exact = weights.copy()
        start = Start(FIRST, RunSettings(name="r"), (grid.initial(LAYOUT, weights, 127),), weights, b"")
        first = first_version(self.checkpoints, self.keys, start, CHUNK_BYTES)
        self.made = [first]

    def step(self, scale: float = 0.01) -> Checkpoint:
        delta = (scale * self.rng.normal(size=N)).astype(np.float32)
        self.exact += delta
        current = self.made[-1]
        making = NextVersion(
            self.checkpoints, self.keys, current, LAYOUT, CHUNK_BYTES, self.max_message_bytes, self.check
        )
        made = Provenance(f"combination{current.version}")
        self.made.append(making.make(self.optimizer, delta, made, current.grids))
        return self.made[-1]

    def weights(self, version: int) -> NDArray[np.float32]:
        with self.checkpoints.weights(version) as file:
            return file[0:N]


class Site:
    """A site's copy, fetched frame by frame from an origin's folder."""

    def __init__(self, directory: Path, origin: Origin) -> None:
        self.model = LocalModel(directory)
        self.origin = origin
        self.keys = KEYS
        self.fetched_bytes = 0

    def take(self, checkpoint: Checkpoint) -> NDArray[np.float32]:
        chain = frames.cheapest(checkpoint.frames, self.model.held, checkpoint.version, self.model.fetched())
        for frame in chain:
            first = keep_sound(self.model.frame_file(frame), frame.payload.digests)
            chunks = read_chunks(frame_file(self.origin.directory, frame.payload.payload_id))
            with ChunkFile(self.model.frame_file(frame)) as file:
                for chunk in islice(chunks, first, None):
                    file.append(chunk)
                    self.fetched_bytes += len(chunk)
        self.model.advance(manifest(checkpoint), chain, self.keys)
        with self.model.weights(checkpoint.version) as weights:
            return weights[0:N]


class KilledError(Exception):
    """Stands for SIGKILL."""


def killed(*_: object, **__: object) -> None:
    raise KilledError


def manifest(checkpoint: Checkpoint) -> ModelManifest:
    return ModelManifest(
        run="r",
        opening=FIRST,
        version=checkpoint.version,
        task="t",
        seed=0,
        parameters=PARAMETERS,
        weights_digest=checkpoint.weights_digest,
        frames=checkpoint.frames,
        grid=checkpoint.grids[-1],
        grid_ids=tuple(grid.grid_id for grid in checkpoint.grids),
        key_id="k",
        training=TrainingSettings(),
        aggregation=AggregationSettings(),
        delta=DeltaSettings(),
    )


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    return Origin(tmp_path / "origin")


def test_a_site_that_takes_every_version_has_the_published_weights_to_the_bit(origin: Origin, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", origin)
    for version in range(13):
        checkpoint = origin.step() if version else origin.made[0]
        np.testing.assert_array_equal(site.take(checkpoint), origin.weights(checkpoint.version))
    assert site.fetched_bytes < 13 * 4 * N / 4


def test_rounding_is_made_up_for_by_the_next_versions(origin: Origin) -> None:
    errors = []
    for _ in range(12):
        checkpoint = origin.step()
        errors.append(float(np.abs(origin.weights(checkpoint.version) - origin.exact).max()))
    assert max(errors) < 0.01  # half a step, and it does not add up
    assert max(errors[6:]) < 1.5 * max(errors[:6])


def test_a_site_that_missed_versions_takes_the_cheapest_way(origin: Origin, tmp_path: Path) -> None:
    late, near = Site(tmp_path / "late", origin), Site(tmp_path / "near", origin)
    for version in range(1, 41):
        newest = origin.step()
        if version == 38:
            near.take(newest)
            near.fetched_bytes = 0
    for site in (late, near):
        np.testing.assert_array_equal(site.take(newest), origin.weights(40))
    whole = sum(frame.payload.n_bytes for frame in newest.frames)
    assert late.fetched_bytes < whole / 2
    assert near.fetched_bytes == sum(frame.payload.n_bytes for frame in newest.frames[-2:])


def test_frames_of_no_use_any_more_go(origin: Origin) -> None:
    for _ in range(60):
        newest = origin.step()
    kept = {frame_file(origin.directory, frame.payload.payload_id).name for frame in newest.frames}
    assert {file.name for file in origin.directory.glob("frame-*")} == kept
    assert sum(frame.is_keyframe for frame in newest.frames) == 2
    assert len(newest.frames) <= 2 * LONGEST_CHAIN + 2
    names = {file.name for file in origin.directory.iterdir()}
    assert len([name for name in names if name.startswith("version-")]) == 2 * KEPT_VERSIONS
    assert [name for name in names if name.startswith("optimizer-")] == ["optimizer-60.safetensors"]


@pytest.mark.parametrize("max_message_bytes", [1200, 1800])
def test_a_manifest_stays_a_message_however_many_versions_there_were(tmp_path: Path, max_message_bytes: int) -> None:
    origin = Origin(tmp_path / "origin", max_message_bytes=max_message_bytes)
    follower, newcomers = Site(tmp_path / "site", origin), []
    for version in range(3 * LONGEST_CHAIN):
        checkpoint = origin.step()
        assert len(wire.pack(manifest(checkpoint))) <= max_message_bytes
        newcomers.append(Site(tmp_path / f"newcomer{version}", origin))
        for site in (follower, newcomers[-1]):
            np.testing.assert_array_equal(site.take(checkpoint), origin.weights(checkpoint.version))
    assert follower.fetched_bytes < sum(newcomer.fetched_bytes for newcomer in newcomers) / 2


def test_a_coordinator_that_is_killed_while_it_makes_a_version_makes_it_again(origin: Origin) -> None:
    checkpoint = origin.step()
    weights, state = origin.checkpoints.create(2)  # killed before it is committed
    weights.write(0, np.ones(5, np.float32))
    (origin.directory / "partial-version-2.msgpack").write_bytes(b"cut sho")
    restarted = Checkpoints(origin.directory, PARAMETERS, origin.optimizer.slots)
    assert restarted.newest() == checkpoint
    assert state.path.exists()
    assert origin.step().version == 2
    np.testing.assert_allclose(origin.weights(2), origin.exact, atol=0.02)


@pytest.mark.parametrize(
    "settings", [ServerSettings(momentum=0.9), ServerSettings(optimizer="adam", learning_rate=0.1)]
)
def test_the_optimisers_state_is_in_the_files(settings: ServerSettings, tmp_path: Path) -> None:
    origin = Origin(tmp_path / "origin", settings)
    weights, slots = origin.exact, {name: np.zeros(N, np.float32) for name in origin.optimizer.slots}
    rng = np.random.default_rng(0)
    rng.normal(size=N)
    for n_steps in range(3):
        delta = (0.01 * rng.normal(size=N)).astype(np.float32)
        weights, slots = origin.optimizer.step(weights, slots, delta, n_steps)
        origin.step()
    with origin.checkpoints.state(3) as state:
        np.testing.assert_array_equal(state[0:N], weights)
        np.testing.assert_array_equal(state[N : 2 * N], slots[origin.optimizer.slots[0]])


def test_a_version_is_a_model_that_safetensors_reads(origin: Origin) -> None:
    origin.step()
    model = load_file(weights_file(origin.directory, 1))
    assert {name: array.shape for name, array in model.items()} == {"weight": (100, 70), "bias": (70,)}
    np.testing.assert_array_equal(np.concatenate([model["weight"].ravel(), model["bias"]]), origin.weights(1))
    assert origin.checkpoints.has(1)
    assert not origin.checkpoints.has(7)


def test_a_frame_that_was_tampered_with_is_refused_and_forgotten(origin: Origin, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", origin)
    site.take(origin.made[0])
    checkpoint = origin.step().model_copy(update={"weights_digest": bytes(16)})
    with pytest.raises(RefusedError) as refused:
        site.take(checkpoint)
    assert refused.value.reason is Reason.CHECKSUM
    assert site.model.held == -1
    assert not site.model.fetched()
    np.testing.assert_array_equal(site.take(origin.made[-1]), origin.weights(1))


def test_a_copy_that_was_damaged_on_disk_is_dropped_and_fetched_again(origin: Origin, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", origin)
    site.take(origin.made[0])
    (copy,) = (tmp_path / "site").glob("version-*")
    for damaged in (copy.read_bytes()[:-4], b""):
        copy.write_bytes(damaged)
        with pytest.raises(LocalStorageError, match=r"version-0\.safetensors.*removed"):
            site.model.weights(0)
        np.testing.assert_array_equal(site.take(origin.made[0]), origin.weights(0))
    copy.write_bytes(b"")
    with pytest.raises(LocalStorageError, match=r"version-0\.safetensors.*removed"):
        site.take(origin.step())
    np.testing.assert_array_equal(site.take(origin.made[-1]), origin.weights(1))


def test_a_site_killed_while_it_takes_a_version_needs_no_keyframe(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = Site(tmp_path / "site", origin)
    site.take(origin.made[0])
    origin.step()
    for kills_at in ("rename", "unlink"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, kills_at, killed)
            with pytest.raises(KilledError):
                site.take(origin.made[-1])
        site = Site(tmp_path / "site", origin)
        assert site.model.held == (0 if kills_at == "rename" else 1)
    origin.step()
    np.testing.assert_array_equal(site.take(origin.made[-1]), origin.weights(2))
    assert site.fetched_bytes == origin.made[-1].frames[-1].payload.n_bytes, "one difference"


def test_without_the_run_s_key_a_frame_says_nothing(origin: Origin, tmp_path: Path) -> None:
    published = b"".join(read_chunks(frame_file(origin.directory, origin.made[0].frames[0].payload.payload_id)))
    for plain in (origin.weights(0)[:8].tobytes(), b"chunk", b"\x28\xb5\x2f\xfd"):  # the last begins what zstd made
        assert plain not in published
    site = Site(tmp_path / "site", origin)
    site.keys = ModelKeys([generate()], "r")
    with pytest.raises(RefusedError) as refused:
        site.take(origin.made[0])
    assert refused.value.reason is Reason.WRONG_KEY
    assert "is sealed with key" in refused.value.detail
    site.keys = KEYS
    np.testing.assert_array_equal(site.take(origin.made[0]), origin.weights(0))


def test_after_a_rotation_the_new_key_alone_is_enough(origin: Origin, tmp_path: Path) -> None:
    for _ in range(2):
        origin.step()
    stays = Site(tmp_path / "stays", origin)
    stays.take(origin.made[-1])
    new = generate()
    origin.keys = stays.keys = ModelKeys([new, SECRET], "r")
    for _ in range(2):
        checkpoint = origin.step()
        joins = Site(tmp_path / f"joins-{checkpoint.version}", origin)
        joins.keys = ModelKeys([new], "r")
        for site in (stays, joins):
            np.testing.assert_array_equal(site.take(checkpoint), origin.weights(checkpoint.version))
    assert sum(frame.is_keyframe for frame in checkpoint.frames) == 2, "one more, once"
    revoked = Site(tmp_path / "revoked", origin)
    with pytest.raises(RefusedError) as refused:
        revoked.take(checkpoint)
    assert refused.value.reason is Reason.WRONG_KEY


def test_frames_that_were_exchanged_on_the_way_are_refused(origin: Origin, tmp_path: Path) -> None:
    """Whoever runs the bus, and could have a digest to match, still has no key to seal with."""
    site = Site(tmp_path / "site", origin)
    site.take(origin.made[0])
    first, second = origin.step().frames[-1], origin.step().frames[-1]
    path, other = (frame_file(origin.directory, frame.payload.payload_id) for frame in (first, second))
    path.write_bytes(other.read_bytes())
    with pytest.raises(RefusedError) as refused:
        site.take(origin.made[-1])
    assert refused.value.reason is Reason.SEAL


def frame(version: int, n_bytes: int, *, key: bool = False) -> Frame:
    payload = Payload(payload_id=f"{'k' if key else 'd'}{version}", n_bytes=n_bytes, digests=())
    return Frame(version=version, steps=() if key else (1.0,), payload=payload)


OFFERED = (frame(0, 100, key=True), *(frame(v, 10) for v in range(1, 6)), frame(5, 100, key=True), frame(6, 10))


@pytest.mark.parametrize(
    ("held", "version", "fetched", "expected"),
    [
        (-1, 6, {}, ["k5", "d6"]),
        (2, 6, {}, ["d3", "d4", "d5", "d6"]),
        (-1, 2, {}, ["k0", "d1", "d2"]),
        (-1, 6, {"k0": 100}, ["k0", "d1", "d2", "d3", "d4", "d5", "d6"]),
        (-1, 6, {"k0": 30}, ["k5", "d6"]),
        (5, 6, {}, ["d6"]),
    ],
)
def test_the_cheapest_chain(held: int, version: int, fetched: dict[str, int], expected: Sequence[str]) -> None:
    chain = frames.cheapest(OFFERED, held, version, fetched)
    assert [frame.payload.payload_id for frame in chain] == expected


def test_no_way_is_an_error_that_names_what_is_there() -> None:
    with pytest.raises(RefusedError, match=r"from version 1 to 7 over the frames key0, 1, 2"):
        frames.cheapest(OFFERED, 1, 7)


def test_a_transfer_that_broke_goes_on_after_its_last_sound_chunk(tmp_path: Path) -> None:
    path = tmp_path / "frame.chunks"
    with ChunkFile(path) as file:
        for chunk in (b"one", b"two", b"three"):
            file.append(chunk)
        payload = file.payload("p")
    path.write_bytes(path.read_bytes()[:-2])
    assert keep_sound(path, payload.digests) == 2
    with ChunkFile(path) as file:
        file.append(b"three")
    assert list(read_chunks(path)) == [b"one", b"two", b"three"]
    assert keep_sound(path, (payload.digests[0], bytes(16))) == 1
    assert list(read_chunks(path)) == [b"one"]
    assert keep_sound(tmp_path / "absent", payload.digests) == 0


def test_a_version_that_no_model_can_hold_is_not_made(origin: Origin) -> None:
    origin.check = FlatModel(nn.Linear(100, 70).half()).hollow().check
    with pytest.raises(RefusedError, match=r"weight has a value that is not finite in float16"):
        origin.step(scale=1e6)
    origin.check = FlatModel(nn.Linear(100, 70)).hollow().check
    with pytest.raises(RefusedError, match=r"weight has a value of .*e\+30; lower learning rates"):
        origin.step(scale=1e30)  # finite, but its square is not
    assert origin.checkpoints.newest() == origin.made[0]
    assert origin.step(scale=0.01).version == 1


def test_a_model_of_another_size_or_a_damaged_one_is_named(origin: Origin) -> None:
    other = Checkpoints(origin.directory, PARAMETERS[:1], ())
    with pytest.raises(ConfigError, match="another model than the task's: 2 tensors, the task has 1"):
        other.weights(0)
    renamed = (PARAMETERS[0].model_copy(update={"name": "kernel"}), PARAMETERS[1])
    with pytest.raises(ConfigError, match=r"weight \(100, 70\) where the task has kernel \(100, 70\)"):
        Checkpoints(origin.directory, renamed, ()).weights(0)
    with pytest.raises(ConfigError, match="another server optimiser"):
        Checkpoints(origin.directory, PARAMETERS, ("momentum_buffer",)).state(0)
    file = origin.directory / "version-0.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ConfigError, match=r"version-0\.safetensors.*7070 values"):
        TensorFile.read(file)
