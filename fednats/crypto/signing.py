"""Signatures: Ed25519 (RFC 8032) with the nkeys that the participants' bus users have anyway.

A signed message is the packed message and 64 bytes of signature behind it. Signed is more than is sent: a domain, so that
no signature made for another purpose (nats-server's challenge is signed with the same key) is one of a message; the
subject it is published on, so that it is nothing on another; and the packed message. Its chunks are covered by their
digests in it. Ed25519 is deterministic: what is sent again is the same to the bit.
"""

import base64
import hashlib
import struct
from pathlib import Path

import nkeys
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fednats.errors import ConfigError, Reason, RefusedError

SIGNATURE_BYTES = 64

_MESSAGE = b"fednats signed message 1"
_SECRET = b"fednats secret 1"
_LENGTH = struct.Struct(">I")
_KEY_BYTES = 32
_PUBLIC = struct.Struct("<B32sH")
"""Prefix, key and CRC-16 of the two, in base32."""


class Signer:
    """Signs with one nkey."""

    def __init__(self, seed: str) -> None:
        """Take the nkey ``seed``, ``S...``. Raises ValueError if it is none."""
        prefix, raw = _decode_seed(seed)
        self._key = Ed25519PrivateKey.from_private_bytes(raw)
        checked = bytes([prefix]) + self._key.public_key().public_bytes_raw()
        self.public_key = base64.b32encode(checked + struct.pack("<H", nkeys.crc16(checked))).decode()
        """The public nkey, ``U...`` of a user's."""

    @classmethod
    def read(cls, path: Path | None, setting: str) -> "Signer":
        """Read a seed file.

        Raises:
            ConfigError: it is not given, cannot be read or is no seed.
        """
        if path is None:
            raise ConfigError(f"{setting}: missing; what is sent is signed with it, give the seed file of the bus user")
        try:
            return cls(path.read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{setting}: {path} is not an nkey seed ({type(error).__name__}); give one") from None

    def secret(self, purpose: bytes) -> bytes:
        """Return a secret for one purpose, 32 bytes: it follows from the seed, which does not follow from it."""
        return hashlib.blake2b(purpose, key=self._key.private_bytes_raw(), digest_size=32, person=_SECRET).digest()

    def sign(self, subject: str, packed: bytes) -> bytes:
        """Return ``packed`` as it is published on ``subject``: with its signature behind it."""
        return packed + self.signature(_MESSAGE, subject, packed)

    def signature(self, domain: bytes, context: str, content: bytes) -> bytes:
        """Sign ``content`` for one purpose, 64 bytes."""
        return self._key.sign(_bound(domain, context, content))


def public_key(nkey: str) -> Ed25519PublicKey:
    """Return the key that the public nkey of a user, ``U...``, stands for. Raises ValueError if it is none."""
    try:
        data = base64.b32decode(nkey, casefold=False)
    except ValueError:
        data = b""
    if len(data) != _PUBLIC.size or base64.b32encode(data).decode() != nkey:
        raise ValueError("not a public nkey")
    prefix, raw, checksum = _PUBLIC.unpack(data)
    if prefix != nkeys.PREFIX_BYTE_USER or checksum != nkeys.crc16(data[:-2]):
        raise ValueError("not the public nkey of a user, U...")
    return Ed25519PublicKey.from_public_bytes(raw)


def verified(key: Ed25519PublicKey, subject: str, data: bytes) -> bytes:
    """Return the packed message in ``data``, which came on ``subject`` and must be signed with ``key``.

    Raises:
        RefusedError: ``signature``: it is not, or not for this subject.
    """
    packed, signature = unsigned(data), data[-SIGNATURE_BYTES:]
    if not is_signature(key, signature, _MESSAGE, subject, packed):
        raise RefusedError(Reason.SIGNATURE, f"{len(data)} bytes whose signature is not the sender's for this subject")
    return packed


def is_signature(key: Ed25519PublicKey, signature: bytes, domain: bytes, context: str, content: bytes) -> bool:
    """Whether ``signature`` was made with ``key`` by `Signer.signature` of the same arguments."""
    try:
        key.verify(signature, _bound(domain, context, content))
    except InvalidSignature:
        return False
    return True


def unsigned(data: bytes) -> bytes:
    """Return a signed message without its signature, unverified: for tools that look at what is on the bus."""
    return data[:-SIGNATURE_BYTES]


def _bound(domain: bytes, context: str, content: bytes) -> bytes:
    named = context.encode()
    return b"".join((_LENGTH.pack(len(domain)), domain, _LENGTH.pack(len(named)), named, content))


def _decode_seed(seed: str) -> tuple[int, bytes]:
    try:
        prefix, raw = nkeys.decode_seed(bytearray(seed, "ascii"))
    except nkeys.NkeysError as error:
        raise ValueError("not an nkey seed") from error
    if len(raw) != _KEY_BYTES:
        raise ValueError("not an nkey seed")
    return int(prefix), bytes(raw)
