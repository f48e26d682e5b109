"""A BFV ciphertext as the bare bits of its coefficients, so that there is nothing to parse.

SEAL writes every coefficient as 8 bytes, whatever the size of its prime. TenSEAL wraps that in a protobuf and trusts
its fields when it decrypts. Here a ciphertext is only its coefficients, bit-packed, in SEAL's order: two polynomials,
each modulo every prime. The length is known beforehand, and any bytes of that length whose coefficients are below
their primes are a ciphertext. TenSEAL never parses bytes from someone else.
"""

import struct
from typing import Any

import numpy as np
import tenseal as ts
import zstandard
from numpy.typing import NDArray

from fednats.errors import ConfigError, Reason, RefusedError

_SIZES_FIELD, _CIPHERTEXTS_FIELD = b"\x0a", b"\x12"  # protobuf tags of TenSEAL's BFVVectorProto
_SEAL_HEADER = struct.Struct("<HBBBBHQ")  # magic, header size, version major and minor, compression, 0, total size
_NONE, _ZSTD = 0, 2
_PREAMBLE_BYTES = 97  # what SEAL 4 writes first: parms id, form, dimensions, scale, correction, array header
_WORD_BYTES = 8


class CiphertextFormat:
    """Reads and writes the ciphertexts of one context, whose public key encrypts one sample at the start."""

    def __init__(self, context: ts.Context) -> None:
        level = context.seal_context().data.first_context_data().parms()
        self._context = context
        self._primes = np.array([prime.value() for prime in level.coeff_modulus()], dtype=np.uint64)
        self._bits = [int(prime).bit_length() for prime in self._primes]
        self.n_slots = int(level.poly_modulus_degree())
        self.plain_modulus = int(level.plain_modulus().value())
        self.ciphertext_bytes = 2 * self.n_slots * sum(self._bits) // 8
        self._n_words = 2 * len(self._bits) * self.n_slots
        sample = ts.bfv_vector(context, [0] * self.n_slots).serialize()
        if sample[:1] != _SIZES_FIELD:
            raise ConfigError(f"TenSEAL {ts.__version__} writes ciphertexts in an unknown form; use 0.3.18")
        self._sizes = sample[: 2 + sample[1]]
        self._preamble = self._plain_body(sample)[:_PREAMBLE_BYTES]
        self._prefix = self._tenseal_prefix(sample)

    def write(self, vector: Any) -> bytes:
        """Return the ``ciphertext_bytes`` bytes of ``vector``, a ``tenseal.BFVVector`` of one ciphertext."""
        body = self._plain_body(vector.serialize())
        words = np.frombuffer(body, dtype="<u8", offset=_PREAMBLE_BYTES).reshape(2, len(self._bits), self.n_slots)
        return b"".join(
            pack_words(words[polynomial, prime], bits)
            for polynomial in range(2)
            for prime, bits in enumerate(self._bits)
        )

    def read(self, data: bytes) -> Any:
        """Return the ``tenseal.BFVVector`` for ``data``.

        Raises:
            RefusedError: ``ciphertext``: wrong length, a coefficient out of range, or not encrypted at all.
        """
        if len(data) != self.ciphertext_bytes:
            raise RefusedError(Reason.CIPHERTEXT, f"{len(data)} bytes, a ciphertext has {self.ciphertext_bytes}")
        words = np.empty((2, len(self._bits), self.n_slots), dtype="<u8")
        offset = 0
        for polynomial in range(2):
            for prime, bits in enumerate(self._bits):
                n_bytes = self.n_slots * bits // 8
                words[polynomial, prime] = unpack_words(data[offset : offset + n_bytes], bits)
                offset += n_bytes
        if (words >= self._primes[:, None]).any():
            raise RefusedError(Reason.CIPHERTEXT, "a coefficient is not below its prime")
        if not words[1].any():
            raise RefusedError(Reason.CIPHERTEXT, "not encrypted: the polynomial that hides the plaintext is zero")
        return ts.bfv_vector_from(self._context, self._prefix + self._preamble + words.tobytes())

    def _plain_body(self, serialized: bytes) -> bytes:
        """Return preamble and coefficients, which follow SEAL's header, decompressed."""
        start = self._start(serialized)
        n_bytes = _PREAMBLE_BYTES + _WORD_BYTES * self._n_words
        *_, compression, _, _ = _SEAL_HEADER.unpack_from(serialized, start)
        body = serialized[start + _SEAL_HEADER.size :]
        if compression == _ZSTD:
            body = zstandard.ZstdDecompressor().decompress(body, max_output_size=n_bytes)
        elif compression != _NONE:
            raise ConfigError(f"SEAL compression {compression} is not known; use a TenSEAL wheel from PyPI")
        if len(body) != n_bytes:
            raise ConfigError(f"SEAL wrote {len(body)} bytes for a ciphertext, expected {n_bytes}; use TenSEAL 0.3")
        return bytes(body)

    def _tenseal_prefix(self, sample: bytes) -> bytes:
        """Return the bytes that TenSEAL expects before the preamble, for an uncompressed ciphertext."""
        magic, header_bytes, major, minor, *_ = _SEAL_HEADER.unpack_from(sample, self._start(sample))
        n_bytes = _SEAL_HEADER.size + _PREAMBLE_BYTES + _WORD_BYTES * self._n_words
        header = _SEAL_HEADER.pack(magic, header_bytes, major, minor, _NONE, 0, n_bytes)
        return bytes(self._sizes + _CIPHERTEXTS_FIELD + _varint(n_bytes) + header)

    def _start(self, serialized: bytes) -> int:
        """Return the offset of the ciphertext, after the sizes, a tag and its length."""
        start = len(self._sizes) + 1
        while serialized[start] & 0x80:  # protobuf: another byte of the length follows
            start += 1
        return start + 1


def pack_words(words: NDArray[np.uint64], bits: int) -> bytes:
    """Pack words below ``2**bits``, a multiple of 8 words, into ``bits`` bits each: whole bytes first, then the rests.

    >>> words = np.arange(8, dtype=np.uint64) * 1000
    >>> packed = pack_words(words, 13)
    >>> len(packed), unpack_words(packed, 13).tolist() == words.tolist()
    (13, True)
    """
    whole, rest = divmod(bits, 8)
    columns = np.ascontiguousarray(words, dtype="<u8").view(np.uint8).reshape(-1, _WORD_BYTES)
    packed: bytes = columns[:, :whole].tobytes()
    if rest:
        top = columns[:, whole].reshape(-1, 8).astype("<u8")
        eights = np.bitwise_or.reduce(top << _shifts(rest), axis=1)  # the rests of eight words fill ``rest`` bytes
        packed += eights.view(np.uint8).reshape(-1, _WORD_BYTES)[:, :rest].tobytes()
    return packed


def unpack_words(data: bytes, bits: int) -> NDArray[np.uint64]:
    """Undo `pack_words`."""
    whole, rest = divmod(bits, 8)
    n_words = 8 * len(data) // bits
    columns = np.zeros((n_words, _WORD_BYTES), dtype=np.uint8)
    raw = np.frombuffer(data, dtype=np.uint8)
    columns[:, :whole] = raw[: n_words * whole].reshape(n_words, whole)
    if rest:
        eights = np.zeros((n_words // 8, _WORD_BYTES), dtype=np.uint8)
        eights[:, :rest] = raw[n_words * whole :].reshape(-1, rest)
        top = (eights.view("<u8") >> _shifts(rest)) & np.uint64((1 << rest) - 1)
        columns[:, whole] = top.reshape(-1)
    return columns.view("<u8")[:, 0]


def _shifts(bits: int) -> NDArray[np.uint64]:
    return np.arange(8, dtype=np.uint64) * np.uint64(bits)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number >= 0x80:  # noqa: PLR2004  protobuf: seven bits per byte, the eighth says that more follow
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])
