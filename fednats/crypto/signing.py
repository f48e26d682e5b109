"""Signatures: Ed25519 (RFC 8032) with the nkeys that participants already have as bus users.

A signed message is the packed message followed by a signature of 64 bytes. The signature also covers two things that
are not sent: a domain, so that a signature made for another purpose (the same key signs nats-server's challenge) is
not valid for a message; and the subject, so that the message is valid on no other. Its chunks are covered through
their digests in the message. Ed25519 is deterministic, so a message sent again is the same to the bit.
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
        """Take the nkey ``seed``, ``S...``. Raises ValueError if it is not a seed."""
        prefix, raw = _decode_seed(seed)
        self._key = Ed25519PrivateKey.from_private_bytes(raw)
        checked = bytes([prefix]) + self._key.public_key().public_bytes_raw()
        self.public_key = base64.b32encode(checked + struct.pack("<H", nkeys.crc16(checked))).decode()
        """The public nkey, ``U...`` for a user's seed."""

    @classmethod
    def read(cls, path: Path | None, setting: str) -> "Signer":
        """Read a seed file.

        Raises:
            ConfigError: no path is given, or the file cannot be read or is not a seed.
        """
        if path is None:
            raise ConfigError(f"{setting}: missing; what is sent is signed with it, give the seed file of the bus user")
        try:
            return cls(path.read_text(encoding="ascii").strip())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{setting}: {path} is not an nkey seed ({type(error).__name__}); give one") from None

    def secret(self, purpose: bytes) -> bytes:
        """Derive a secret for one purpose from the seed, 32 bytes; it does not reveal the seed."""
        return hashlib.blake2b(purpose, key=self._key.private_bytes_raw(), digest_size=32, person=_SECRET).digest()

    def sign(self, subject: str, packed: bytes) -> bytes:
        """Return ``packed`` with its signature for ``subject`` appended, ready to publish."""
        return packed + self.signature(_MESSAGE, subject, packed)

    def signature(self, domain: bytes, context: str, content: bytes) -> bytes:
        """Sign ``content`` for one purpose, ``domain``, and ``context``; return 64 bytes."""
        return self._key.sign(_bound(domain, context, content))


def public_key(nkey: str) -> Ed25519PublicKey:
    """Decode the public nkey of a user, ``U...``. Raises ValueError if it is not one."""
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
    """Return the packed message in ``data`` from ``subject``, which must be signed with ``key``.

    Raises:
        RefusedError: ``signature``: not signed with ``key``, or not for this subject.
    """
    packed, signature = unsigned(data), data[-SIGNATURE_BYTES:]
    if not is_signature(key, signature, _MESSAGE, subject, packed):
        raise RefusedError(Reason.SIGNATURE, f"{len(data)} bytes whose signature is not the sender's for this subject")
    return packed


def is_signature(key: Ed25519PublicKey, signature: bytes, domain: bytes, context: str, content: bytes) -> bool:
    """Return whether `Signer.signature` made ``signature`` with ``key`` and the same arguments."""
    try:
        key.verify(signature, _bound(domain, context, content))
    except InvalidSignature:
        return False
    return True


def unsigned(data: bytes) -> bytes:
    """Strip the signature from a signed message without verifying it, for tools that inspect the bus."""
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
