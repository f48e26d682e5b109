"""Message to bytes and back: msgpack, zstd where it makes the message smaller, limits checked before any work.

Layout: magic ``FN``, schema version (u8), encoding (u8: 0 plain, 1 zstd), length of the plain body (u32, big endian),
body. The body is the msgpack array ``[kind, fields]``.
"""

import hashlib
import struct
from typing import Any, TypeVar, get_args

import msgpack
import zstandard
from pydantic import ValidationError

from fednats.errors import Reason, RefusedError
from fednats.messages import DIGEST_BYTES, AnyMessage, Message

SCHEMA_VERSION = 1
MAX_MESSAGE_BYTES = 8 * 2**20
"""Largest plain body admitted; nats-server's own max_payload limits what is sent."""

ROOM_BYTES = 1024
"""More than the header, the kind, the lengths of a chunk's parts and the seal around it ever take."""

_HEADER = struct.Struct(">2sBBI")
_MAGIC = b"FN"
_PLAIN, _ZSTD = 0, 1
_KINDS: dict[str, type[Message]] = {cls.kind: cls for cls in get_args(AnyMessage)}

MessageT = TypeVar("MessageT", bound=Message)


def pack(message: Message) -> bytes:
    """Serialise ``message``."""
    body: bytes = msgpack.packb([message.kind, message.model_dump()], use_bin_type=True)
    compressed: bytes = zstandard.compress(body, level=1)
    if len(compressed) < len(body):
        return _HEADER.pack(_MAGIC, SCHEMA_VERSION, _ZSTD, len(body)) + compressed
    return _HEADER.pack(_MAGIC, SCHEMA_VERSION, _PLAIN, len(body)) + body


def unpack(data: bytes, expected: type[MessageT]) -> MessageT:
    """Parse ``data`` as a message of type ``expected``.

    Raises:
        RefusedError: malformed, oversized, of another schema version, of another kind, or with wrong fields.
    """
    raw = _decode(_body(data))
    if not (isinstance(raw, tuple) and len(raw) == 2 and isinstance(raw[0], str) and isinstance(raw[1], dict)):  # noqa: PLR2004
        raise RefusedError(Reason.MALFORMED, "body is not [kind, fields]")
    kind, fields = raw
    if _KINDS.get(kind) is not expected:
        raise RefusedError(Reason.MALFORMED, f"kind {kind[:40]!r} where {expected.kind!r} was expected")
    try:
        return expected.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RefusedError(Reason.MALFORMED, f"{kind}.{field}: {first['msg']}") from None


def digest(data: bytes) -> bytes:
    """BLAKE2b-128 of ``data``, the form in `Payload.digests`."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def _body(data: bytes) -> bytes:
    if len(data) < _HEADER.size:
        raise RefusedError(Reason.MALFORMED, f"{len(data)} bytes, shorter than a header")
    magic, version, encoding, n_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise RefusedError(Reason.MALFORMED, "not a fednats message (no magic)")
    if version != SCHEMA_VERSION:
        raise RefusedError(Reason.SCHEMA_VERSION, f"schema version {version}, this is {SCHEMA_VERSION}")
    if n_bytes > MAX_MESSAGE_BYTES or len(data) > MAX_MESSAGE_BYTES + _HEADER.size:
        raise RefusedError(Reason.OVERSIZED, f"{max(n_bytes, len(data))} bytes, the limit is {MAX_MESSAGE_BYTES}")
    body = data[_HEADER.size :]
    if encoding == _ZSTD:
        return _decompress(body, n_bytes)
    if encoding != _PLAIN or len(body) != n_bytes:
        raise RefusedError(Reason.MALFORMED, "body does not match its header")
    return body


def _decompress(body: bytes, n_bytes: int) -> bytes:
    try:
        declared = zstandard.frame_content_size(body)
        if declared != n_bytes:
            raise RefusedError(Reason.MALFORMED, "compressed size does not match the header")
        plain = zstandard.ZstdDecompressor().decompress(body, max_output_size=n_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RefusedError(Reason.MALFORMED, f"not valid zstd ({error})") from None
    if len(plain) != n_bytes:
        raise RefusedError(Reason.MALFORMED, "body does not match its header")
    return plain


def _decode(body: bytes) -> Any:
    try:
        return msgpack.unpackb(body, use_list=False, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise RefusedError(Reason.MALFORMED, f"not valid msgpack ({type(error).__name__})") from None
