"""Integers derived from a secret and a name: repeatable with both, unpredictable without the secret."""

import hashlib

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

_DOMAIN = b"fednats dither"
_NONCE = bytes(16)  # constant: each name has its own key
_WORD_BITS = 32


def uniform(secret: bytes, name: str, n: int, largest: int) -> NDArray[np.int64]:
    """Draw int64[n] from -largest to largest, uniform to within 2^-32; ``secret`` has up to 64 bytes.

    >>> first = uniform(b"secret", "a", 1000, 2)
    >>> sorted(set(first.tolist())), bool((first == uniform(b"secret", "a", 1000, 2)).all())
    ([-2, -1, 0, 1, 2], True)
    """
    key = hashlib.blake2b(name.encode(), key=secret, digest_size=32, person=_DOMAIN).digest()
    stream = Cipher(ChaCha20(key, _NONCE), mode=None).encryptor().update(bytes(n * _WORD_BITS // 8))
    words = np.frombuffer(stream, "<u4").astype(np.uint64)
    scaled = (words * np.uint64(2 * largest + 1)) >> np.uint64(_WORD_BITS)
    return scaled.astype(np.int64) - largest
