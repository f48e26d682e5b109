"""Seals the chunks of a model for coordinator and sites: ChaCha20-Poly1305 (RFC 8439) with the epoch's model key.

Coordinator and sites hold the key; aggregators and bus operators do not. A sealed chunk is the key's id, a nonce, and
the ciphertext with its tag. It is bound to run, payload and position, so one chunk cannot replace another. Nonces are
96 random bits per chunk: among 2^32 chunks under one key (a petabyte), two are alike with probability 2^-33. From the
key id, the holder of another key can tell that the key is wrong, not the chunk.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fednats.errors import ConfigError, Reason, RefusedError

KEY_BYTES = 32
KEY_ID_BYTES = 8
NONCE_BYTES = 12
TAG_BYTES = 16
OVERHEAD_BYTES = KEY_ID_BYTES + NONCE_BYTES + TAG_BYTES
"""How much longer a sealed chunk is than the chunk."""

_DOMAIN = "fednats model chunk 1"


class ModelKeys:
    """Seals chunks of one run's models with the newest key; opens chunks sealed with any key it holds."""

    def __init__(self, keys: Sequence[bytes], run: str) -> None:
        """Take ``keys``, the newest first. Raises ValueError unless each has 32 bytes."""
        self._ciphers = {key_id(key): ChaCha20Poly1305(key) for key in keys}
        self.newest = key_id(keys[0])
        """Id of the key that seals."""
        self._run = run

    @classmethod
    def read(cls, newest: Path, older: Path | None, run: str) -> "ModelKeys":
        """Read the key files of this epoch and the previous one, 32 bytes each.

        Raises:
            ConfigError: a file cannot be read, or is not a key.
        """
        files = {"model_key_file": newest, "older_model_key_file": older}
        return cls([_read(path, setting) for setting, path in files.items() if path is not None], run)

    def seal(self, payload_id: str, position: int, chunk: bytes) -> bytes:
        """Seal chunk number ``position`` of a payload."""
        nonce = os.urandom(NONCE_BYTES)
        cipher = self._ciphers[self.newest]
        return self.newest + nonce + cipher.encrypt(nonce, chunk, self._bound(payload_id, position))

    def opened(self, payload_id: str, position: int, sealed: bytes) -> bytes:
        """Open a chunk that was sealed as number ``position`` of that payload.

        Raises:
            RefusedError: ``wrong_key``: sealed with another key; ``seal``: another chunk, too short, or altered.
        """
        sealed_with, nonce = sealing_key_id(sealed), sealed[KEY_ID_BYTES : KEY_ID_BYTES + NONCE_BYTES]
        what = f"chunk {position} of {payload_id}"
        if len(sealed) < OVERHEAD_BYTES:
            raise RefusedError(Reason.SEAL, f"{what}: {len(sealed)} bytes, shorter than a seal")
        cipher = self._ciphers.get(sealed_with)
        if cipher is None:
            held = " and ".join(each.hex() for each in self._ciphers)
            raise RefusedError(Reason.WRONG_KEY, f"{what} is sealed with key {sealed_with.hex()}, here is {held}")
        try:
            return cipher.decrypt(nonce, sealed[KEY_ID_BYTES + NONCE_BYTES :], self._bound(payload_id, position))
        except InvalidTag:
            raise RefusedError(Reason.SEAL, f"{what} is not what was sealed as such") from None

    def _bound(self, payload_id: str, position: int) -> bytes:
        return f"{_DOMAIN}/{self._run}/{payload_id}/{position}".encode()  # names have no slash


def generate() -> bytes:
    """Make a key, 32 bytes."""
    return ChaCha20Poly1305.generate_key()


def key_id(key: bytes) -> bytes:
    """Return the id of a key, 8 bytes, which reveals nothing about the key."""
    return hashlib.blake2b(key, digest_size=KEY_ID_BYTES, person=b"fednats model id").digest()


def sealing_key_id(sealed: bytes) -> bytes:
    """Return the id of the key that sealed a chunk."""
    return sealed[:KEY_ID_BYTES]


def _read(path: Path, setting: str) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error.strerror})") from error
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{setting}: {path} does not have {KEY_BYTES} bytes; give the run's key")
    return key
