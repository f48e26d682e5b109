"""Sealed chunks: opened with the run's key as the chunk that was sealed, and as nothing else."""

import os
from pathlib import Path

import pytest

from fednats import wire
from fednats.config import RunSettings
from fednats.crypto.sealing import OVERHEAD_BYTES, ModelKeys, generate
from fednats.errors import ConfigError, Reason, RefusedError
from fednats.messages import Chunk
from fednats.services.coordinator.worker import fit_messages

SECRET = generate()
KEY = ModelKeys([SECRET], "r")
CHUNK = wire.pack(Chunk(parts=(b"weights" * 100,)))


def reason(key: ModelKeys, payload_id: str, position: int, sealed: bytes) -> Reason:
    with pytest.raises(RefusedError) as raised:
        key.opened(payload_id, position, sealed)
    assert payload_id in raised.value.detail
    return raised.value.reason


def test_who_has_the_key_reads_what_was_sealed() -> None:
    sealed = KEY.seal("v1", 3, CHUNK)
    assert ModelKeys([SECRET], "r").opened("v1", 3, sealed) == CHUNK
    assert len(sealed) == len(CHUNK) + OVERHEAD_BYTES
    assert CHUNK[:8] not in sealed


def test_no_two_seals_are_alike() -> None:
    assert len({KEY.seal("v1", 3, CHUNK) for _ in range(100)}) == 100


@pytest.mark.parametrize(("payload_id", "position"), [("v1", 4), ("v2", 3), ("v13", 3), ("v1", 33)])
def test_a_chunk_cannot_stand_for_another(payload_id: str, position: int) -> None:
    assert reason(KEY, payload_id, position, KEY.seal("v1", 3, CHUNK)) is Reason.SEAL


def test_a_chunk_is_of_one_run() -> None:
    assert reason(ModelKeys([SECRET], "other"), "v1", 3, KEY.seal("v1", 3, CHUNK)) is Reason.SEAL


def test_another_epoch_s_key_is_told_from_an_altered_chunk() -> None:
    assert reason(ModelKeys([generate()], "r"), "v1", 3, KEY.seal("v1", 3, CHUNK)) is Reason.WRONG_KEY


def test_with_two_epochs_keys_the_newest_seals_and_either_opens(tmp_path: Path) -> None:
    (tmp_path / "old.key").write_bytes(SECRET)
    (tmp_path / "new.key").write_bytes(new := generate())
    both = ModelKeys.read(tmp_path / "new.key", tmp_path / "old.key", "r")
    assert both.opened("v1", 3, KEY.seal("v1", 3, CHUNK)) == CHUNK
    sealed = both.seal("v1", 3, CHUNK)
    assert ModelKeys([new], "r").opened("v1", 3, sealed) == CHUNK
    assert reason(KEY, "v1", 3, sealed) is Reason.WRONG_KEY


def test_every_flipped_byte_is_noticed() -> None:
    sealed = KEY.seal("v1", 3, b"short")
    for position in range(len(sealed)):
        altered = bytearray(sealed)
        altered[position] ^= 1
        assert reason(KEY, "v1", 3, bytes(altered)) in {Reason.SEAL, Reason.WRONG_KEY}
    for length in range(len(sealed)):
        assert reason(KEY, "v1", 3, sealed[:length]) is Reason.SEAL


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_file_of_another_size_is_named(tmp_path: Path, size: int) -> None:
    (tmp_path / "model.key").write_bytes(os.urandom(size))
    with pytest.raises(ConfigError, match=r"model\.key does not have 32 bytes"):
        ModelKeys.read(tmp_path / "model.key", None, "r")
    with pytest.raises(ConfigError, match=r"absent\.key cannot be read"):
        ModelKeys.read(tmp_path / "absent.key", None, "r")


def test_the_largest_sealed_chunk_fits_the_server_s_largest_message() -> None:
    """Random bytes do not compress, so a chunk is as large as it gets."""
    max_payload_bytes = 2**16
    n_bytes = fit_messages(RunSettings(name="r"), max_payload_bytes).delta.chunk_bytes
    sealed = KEY.seal("v1", 3, wire.pack(Chunk(parts=(os.urandom(n_bytes),))))
    assert n_bytes < len(sealed) <= max_payload_bytes
