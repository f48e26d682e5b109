"""Messages to bytes and back: msgpack, compressed with zstd if that is smaller. Limits are checked before any work.

Layout: magic ``FN``, schema version (u8), encoding (u8: 0 plain, 1 zstd), length of the plain body (u32, big endian),
body. The body is the msgpack array ``[kind, fields]``.
"""

import hashlib
import struct
from collections.abc import Mapping, Sized
from typing import Any, TypeVar, get_args

import msgpack
import zstandard
from pydantic import ValidationError

from fednats import __version__
from fednats.errors import Reason, RefusedError
from fednats.messages import DIGEST_BYTES, AnyMessage, Message, SignedMessage

SCHEMA_VERSION = 1
MAX_MESSAGE_BYTES = 8 * 2**20
"""Largest plain body accepted, in bytes; nats-server's max_payload limits what is sent."""

ROOM_BYTES = 1024
"""Upper bound of the bytes around a chunk's content: header, kind, lengths of its parts, and seal."""

MAX_ITEMS = 2**20
"""Most values in one body, over all lists and maps; keeps an unpacked body below 128 MiB."""

MAX_LIST, MAX_MAP = 2**16, 2**10
"""Most values in one list, and fields in one map."""

MAX_FIELD_TEXT = 200
"""Most characters quoted of a refused field's name, which a stranger may have chosen."""

MAX_RELEASE_TEXT = 64

_HEADER = struct.Struct(">2sBBI")
_MAGIC = b"FN"
_PLAIN, _ZSTD = 0, 1
_KINDS: dict[str, type[Message]] = {cls.kind: cls for cls in get_args(AnyMessage)}

MessageT = TypeVar("MessageT", bound=Message)
ItemsT = TypeVar("ItemsT", bound=Sized)


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
        RefusedError: malformed, too large, of another schema version or kind, or with wrong fields.
    """
    raw = unpack_values(_body(data))
    if not (isinstance(raw, tuple) and len(raw) == 2 and isinstance(raw[0], str) and isinstance(raw[1], dict)):  # noqa: PLR2004
        raise RefusedError(Reason.MALFORMED, "body is not [kind, fields]")
    kind, fields = raw
    if _KINDS.get(kind) is not expected:
        raise RefusedError(Reason.MALFORMED, f"kind {kind[:40]!r} where {expected.kind!r} was expected")
    try:
        return expected.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        field = ".".join(str(part)[:MAX_FIELD_TEXT] for part in first["loc"])
        detail = f"{kind}.{field}: {first['msg']}{_releases(fields, expected)}"
        raise RefusedError(Reason.MALFORMED, detail) from None


def _releases(fields: Mapping[str, object], expected: type[Message]) -> str:
    """Return the releases of sender and receiver as text, if messages of this kind name their sender's."""
    if not issubclass(expected, SignedMessage):
        return ""
    release = fields.get("release")
    sent_by = release[:MAX_RELEASE_TEXT] if isinstance(release, str) and release.isprintable() else "unknown"
    return f" (sent by release {sent_by}, this is release {__version__})"


def digest(data: bytes) -> bytes:
    """Return BLAKE2b-128 of ``data``, as in `Payload.digests`."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def message_id(signed: bytes) -> str:
    """Return the id of a signed message. It is the same when sent again, and nobody else can produce it in advance.

    A stream drops any message with an id it has seen, from any sender and on any of its subjects.
    """
    return digest(signed).hex()


def unpack_values(body: bytes) -> Any:
    """Unpack msgpack from an untrusted source; lists become tuples.

    The body is first walked without building values, so a list that claims more items than the body has is found before
    memory for it is allocated.

    Raises:
        RefusedError: ``malformed``; or ``oversized``, with more values than any message has.
    """
    room = _Room()
    try:
        walker = msgpack.Unpacker(max_buffer_size=max(len(body), 1))
        walker.feed(body)
        walker.skip()
        return msgpack.unpackb(
            body,
            use_list=False,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_LIST,
            max_map_len=MAX_MAP,
            max_ext_len=0,
            list_hook=room.take,
            object_hook=room.take,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise RefusedError(Reason.MALFORMED, f"not valid msgpack ({type(error).__name__})") from None


class _Room:
    """Counts the values unpacked."""

    def __init__(self) -> None:
        self._left = MAX_ITEMS

    def take(self, items: ItemsT) -> ItemsT:
        self._left -= 1 + len(items)
        if self._left < 0:
            raise RefusedError(Reason.OVERSIZED, f"more than {MAX_ITEMS} values")
        return items


def _body(data: bytes) -> bytes:
    if len(data) < _HEADER.size:
        raise RefusedError(Reason.MALFORMED, f"{len(data)} bytes, shorter than a header")
    magic, version, encoding, n_bytes = _HEADER.unpack_from(data)
    if magic != _MAGIC:
        raise RefusedError(Reason.MALFORMED, "not a fednats message (no magic)")
    if version != SCHEMA_VERSION:
        raise RefusedError(
            Reason.SCHEMA_VERSION, f"schema version {version}, release {__version__} takes {SCHEMA_VERSION}"
        )
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
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_MESSAGE_BYTES)
        plain = decompressor.decompress(body, max_output_size=n_bytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise RefusedError(Reason.MALFORMED, f"not valid zstd ({error})") from None
    if len(plain) != n_bytes:
        raise RefusedError(Reason.MALFORMED, "body does not match its header")
    return plain
