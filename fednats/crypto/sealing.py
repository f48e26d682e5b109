"""Chunks of a model, sealed for those who take part: ChaCha20-Poly1305 (RFC 8439) with the key of the epoch.

Coordinator and sites have the key, aggregators and bus operators have not. A sealed chunk is the id of the key, a nonce
and the ciphertext with its tag. Bound to it are run, payload and position, so that a chunk cannot stand for another.
Nonces are drawn at random, 96 bits for each chunk: with 2^32 chunks of one key (a petabyte) the odds that two are alike
are 2^-33. The key id names the epoch of the key: who holds another key can say so instead of finding garbage.
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
"""By so much a sealed chunk is longer."""

_DOMAIN = "fednats model chunk 1"


class ModelKeys:
    """Seals chunks of the models of one run with the newest key, opens those of all that are held."""

    def __init__(self, keys: Sequence[bytes], run: str) -> None:
        """Take ``keys``, the newest first. Raises ValueError unless each has 32 bytes."""
        self._ciphers = {key_id(key): ChaCha20Poly1305(key) for key in keys}
        self.newest = key_id(keys[0])
        """Id of the key that seals."""
        self._run = run

    @classmethod
    def read(cls, newest: Path, older: Path | None, run: str) -> "ModelKeys":
        """Read the key files of this epoch and of the one before, 32 bytes each.

        Raises:
            ConfigError: one cannot be read, or is no key.
        """
        files = {"model_key_file": newest, "older_model_key_file": older}
        return cls([_read(path, setting) for setting, path in files.items() if path is not None], run)

    def seal(self, payload_id: str, position: int, chunk: bytes) -> bytes:
        """Return chunk number ``position`` of a payload, sealed."""
        nonce = os.urandom(NONCE_BYTES)
        cipher = self._ciphers[self.newest]
        return self.newest + nonce + cipher.encrypt(nonce, chunk, self._bound(payload_id, position))

    def opened(self, payload_id: str, position: int, sealed: bytes) -> bytes:
        """Return what was sealed as chunk number ``position`` of that payload.

        Raises:
            RefusedError: ``wrong_key``: it was sealed with another key; ``seal``: it is not that chunk, or was altered.
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
    """Return what says which key it is, and nothing of it: 8 bytes."""
    return hashlib.blake2b(key, digest_size=KEY_ID_BYTES, person=b"fednats model id").digest()


def sealing_key_id(sealed: bytes) -> bytes:
    """Return the id of the key that a chunk is sealed with."""
    return sealed[:KEY_ID_BYTES]


def _read(path: Path, setting: str) -> bytes:
    try:
        key = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{setting}: {path} cannot be read ({error.strerror})") from error
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{setting}: {path} does not have {KEY_BYTES} bytes; give the run's key")
    return key
