"""Chunks of a model, sealed for those who take part: ChaCha20-Poly1305 (RFC 8439) with the key of the run.

Coordinator and sites have the key, aggregators and bus operators have not. A sealed chunk is the id of the key, a nonce
and the ciphertext with its tag. Bound to it are run, payload and position, so that a chunk cannot stand for another.
Nonces are drawn at random, 96 bits for each chunk: with 2^32 chunks of one key (a petabyte) the odds that two are alike
are 2^-33. The key id names the epoch of the key: who holds another key can say so instead of finding garbage.
"""

import hashlib
import os
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


class ModelKey:
    """Seals and opens chunks of the models of one run."""

    def __init__(self, key: bytes, run: str) -> None:
        """Take ``key``. Raises ValueError unless it has 32 bytes."""
        self._cipher = ChaCha20Poly1305(key)
        self._run = run
        self.key_id = hashlib.blake2b(key, digest_size=KEY_ID_BYTES, person=b"fednats model id").digest()
        """Says which key it is, and nothing of it."""

    @classmethod
    def read(cls, path: Path, run: str) -> "ModelKey":
        """Read a key file of 32 bytes.

        Raises:
            ConfigError: it cannot be read, or is no key.
        """
        try:
            return cls(path.read_bytes(), run)
        except OSError as error:
            raise ConfigError(f"model_key_file: {path} cannot be read ({error.strerror})") from error
        except ValueError:
            raise ConfigError(f"model_key_file: {path} does not have {KEY_BYTES} bytes; give the run's key") from None

    def seal(self, payload_id: str, position: int, chunk: bytes) -> bytes:
        """Return chunk number ``position`` of a payload, sealed."""
        nonce = os.urandom(NONCE_BYTES)
        return self.key_id + nonce + self._cipher.encrypt(nonce, chunk, self._bound(payload_id, position))

    def opened(self, payload_id: str, position: int, sealed: bytes) -> bytes:
        """Return what was sealed as chunk number ``position`` of that payload.

        Raises:
            RefusedError: ``wrong_key``: it was sealed with another key; ``seal``: it is not that chunk, or was altered.
        """
        key_id, nonce = sealed[:KEY_ID_BYTES], sealed[KEY_ID_BYTES : KEY_ID_BYTES + NONCE_BYTES]
        what = f"chunk {position} of {payload_id}"
        if len(sealed) < OVERHEAD_BYTES:
            raise RefusedError(Reason.SEAL, f"{what}: {len(sealed)} bytes, shorter than a seal")
        if key_id != self.key_id:
            raise RefusedError(
                Reason.WRONG_KEY, f"{what} is sealed with key {key_id.hex()}, model_key_file holds {self.key_id.hex()}"
            )
        try:
            return self._cipher.decrypt(nonce, sealed[KEY_ID_BYTES + NONCE_BYTES :], self._bound(payload_id, position))
        except InvalidTag:
            raise RefusedError(Reason.SEAL, f"{what} is not what was sealed as such") from None

    def _bound(self, payload_id: str, position: int) -> bytes:
        return f"{_DOMAIN}/{self._run}/{payload_id}/{position}".encode()  # names have no slash


def generate() -> bytes:
    """Make a key, 32 bytes."""
    return ChaCha20Poly1305.generate_key()
