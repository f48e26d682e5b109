"""Hostile bytes made from honest ones, by seed: what a fuzzer that knows the formats would send."""

import random
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgpack
import zstandard

from fednats import wire
from fednats.messages import Message

HEADER = struct.Struct(">2sBBI")
BOMB_BYTES = wire.MAX_MESSAGE_BYTES
LARGEST_BODY_BYTES = 2**20

INTERESTING = (0, 1, -1, 127, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**40 + 1, 2**63 - 1, 2**64 - 1, -(2**63))
FLOATS = (0.0, -0.0, 1e308, -1e308, 5e-324, float("nan"), float("inf"), float("-inf"), 1e-9, 1e15)


def mutated(rng: random.Random, corpus: Sequence[bytes]) -> bytes:
    """Change bytes without knowing what they are."""
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        rng.choice(_ON_BYTES)(rng, data, corpus)
    return bytes(data)


def hostile_message(rng: random.Random, messages: Sequence[Message]) -> bytes:
    """Change a message's fields, its packed body, or its envelope."""
    choice = rng.random()
    if choice < 0.002:
        return enveloped(rng, rng.choice(_BOMBS)(rng))
    message = rng.choice(messages)
    if choice < 0.05:
        return wire.pack(message)
    if choice < 0.3:
        return mutated(rng, [wire.pack(message)])
    fields: Any = [message.kind, message.model_dump()]
    for _ in range(rng.choice((1, 1, 2, 5))):
        fields = changed(rng, fields)
    body = _packed(fields)
    return enveloped(rng, mutated(rng, [body]) if choice > 0.8 else body)


def changed(rng: random.Random, tree: Any) -> Any:
    """Replace one node of a tree of plain values, or drop or add one."""
    if isinstance(tree, Mapping) and tree and rng.random() < 0.9:
        fields = dict(tree)
        key = rng.choice(list(fields))
        if rng.random() < 0.1:
            del fields[key]
        elif rng.random() < 0.1:
            fields[rng.choice(("x", "k" * 70_000, 7, b"b"))] = strange(rng)
        else:
            fields[key] = changed(rng, fields[key])
        return fields
    if isinstance(tree, list | tuple) and tree and rng.random() < 0.9:
        items = list(tree)
        index = rng.randrange(len(items))
        if rng.random() < 0.1:
            times = 2 if len(items) > 20 or any(isinstance(item, bytes) for item in items) else 100
            return items * (times if _size(items) * times < LARGEST_BODY_BYTES else 1)
        if rng.random() < 0.1:
            return [*items, strange(rng)]
        items[index] = changed(rng, items[index])
        return items
    return _of_its_type(rng, tree) if rng.random() < 0.6 else strange(rng)


def _size(tree: Any) -> int:
    """Return about how many bytes a tree takes when it is packed; trees are deeper than calls may be nested."""
    total, waiting = 0, [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, Mapping):
            waiting += [*node.keys(), *node.values()]
        elif isinstance(node, list | tuple):
            waiting += node
        total += len(node) if isinstance(node, bytes | str) else 9
    return total


def _of_its_type(rng: random.Random, value: Any) -> Any:
    """Return another value that may pass where this one does."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + rng.choice((-1, 1, 2**16, 2**40 - value))
    if isinstance(value, float):
        return rng.choice((1.0, 1e-30, 1e15, -1e15, *FLOATS))
    if isinstance(value, str):
        return rng.choice(("a", "none", "x" * 64, "all", "a b"))
    if isinstance(value, bytes):
        return rng.randbytes(len(value)) if rng.random() < 0.5 else mutated(rng, [value])
    return type(value)()


def strange(rng: random.Random) -> Any:
    """Return a value of any type and size."""
    kind = rng.randrange(12)
    if kind < 3:
        return rng.choice(INTERESTING)
    if kind < 5:
        return rng.choice(FLOATS)
    return (
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice(("", "a", "x" * 100_000, "../../etc/passwd", "a.b.>", "\x00", "\u202e\U0001f4a3")),
        lambda: rng.randbytes(rng.choice((0, 1, 16, 17, 5000))),
        lambda: nested(rng.choice((2, 50, 600))),
        lambda: [rng.choice(INTERESTING)] * rng.choice((0, 3, 17, 300)),
        lambda: {"a": {}, "b": [{}] * rng.choice((1, 300))},
    )[kind - 5]()


def nested(depth: int) -> Any:
    """Return lists in lists."""
    tree: Any = []
    for _ in range(depth):
        tree = [tree]
    return tree


def enveloped(rng: random.Random, body: bytes) -> bytes:
    """Put a body into an envelope, now and then one that lies."""
    stated = rng.choice((0, 2**31, len(body) + 1, BOMB_BYTES)) if rng.random() < 0.05 else len(body)
    version = rng.choice((0, 2, 255)) if rng.random() < 0.02 else wire.SCHEMA_VERSION
    if rng.random() < 0.3 or len(body) > 2**20:
        return HEADER.pack(b"FN", version, 1, stated) + zstandard.compress(body, level=1)
    return HEADER.pack(b"FN", version, rng.choice((0, 0, 0, 1, 2)), stated) + body


def _packed(tree: Any) -> bytes:
    try:
        return bytes(msgpack.packb(tree, use_bin_type=True))
    except (ValueError, OverflowError, TypeError):  # deeper or larger than msgpack itself writes
        return bytes(msgpack.packb(["update", {}]))


# --- on bytes ---------------------------------------------------------------------------------------------------------


def _place(rng: random.Random, data: bytearray) -> int:
    """Return an index, most often in the beginning, where lengths and headers are."""
    end = len(data) if rng.random() < 0.5 else min(len(data), 64)
    return rng.randrange(end) if end else 0


def _flip(rng: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    if data:
        data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _truncate(rng: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    del data[_place(rng, data) :]


def _extend(rng: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    data += rng.choice((b"\x00", b"\xff")) * rng.choice((1, 100, 10_000))


def _splice(rng: random.Random, data: bytearray, corpus: Sequence[bytes]) -> None:
    other = bytearray(rng.choice(corpus))
    data[_place(rng, data) :] = other[_place(rng, other) :]


def _repeat(rng: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    start = _place(rng, data)
    data[start:start] = bytes(data[start : start + rng.choice((1, 8, 100))]) * rng.choice((2, 50))


def _fill(rng: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    start, n = _place(rng, data), rng.choice((1, 2, 4, 8, 64))
    data[start : start + n] = bytes([rng.choice((0, 0x7F, 0x80, 0xC0, 0xDD, 0xDF, 0xFF))]) * len(
        data[start : start + n]
    )


def _number(rng: random.Random, data: bytearray, _corpus: Sequence[bytes]) -> None:
    start, number = _place(rng, data), rng.choice(INTERESTING) % 2**32
    coded = struct.pack(rng.choice(("<I", ">I")), number)
    data[start : start + 4] = coded[: len(data[start : start + 4])]


_ON_BYTES: tuple[Callable[[random.Random, bytearray, Sequence[bytes]], None], ...] = (
    _flip, _flip, _truncate, _extend, _splice, _repeat, _fill, _number,
)  # fmt: skip


# --- bombs: a message of a kilobyte that unpacks to as much as one may -----------------------------------------------


def _announced(rng: random.Random) -> bytes:
    """Lists that are said to be long, in lists that are said to be long."""
    header = b"\xdd" + struct.pack(">I", rng.choice((2**16, 8_000_000, 2**32 - 1)))
    return (header * rng.choice((1, 100, 1000))).ljust(BOMB_BYTES, b"\xc0")


def _small_values(rng: random.Random) -> bytes:
    """As many small things as fit: maps, lists of one, texts of two letters."""
    item = rng.choice((b"\x80", b"\x91\xc0", b"\xa2ab", b"\xc4\x02xx", b"\xcb" + bytes(8)))
    n = rng.choice((2**16, BOMB_BYTES // len(item) - 8))
    return b"\xdd" + struct.pack(">I", n) + item * n


def _many_lists(rng: random.Random) -> bytes:
    """As many lists as fit, each as long as one may be."""
    item = rng.choice((b"\x80", b"\x91\xc0", b"\xa2ab", b"\xc0"))
    n = BOMB_BYTES // (len(item) * 2**16 + 8)
    one = b"\xdd" + struct.pack(">I", 2**16) + item * 2**16
    return b"\xdd" + struct.pack(">I", n) + one * n


def _deep(rng: random.Random) -> bytes:
    """Deeper than anything walks."""
    return rng.choice((b"\x91", b"\x81\xa1k")) * rng.choice((1000, 1_000_000)) + b"\xc0"


def _big(_rng: random.Random) -> bytes:
    """One value as large as a message."""
    return b"\xc6" + struct.pack(">I", BOMB_BYTES - 100) + bytes(BOMB_BYTES - 100)


_BOMBS: tuple[Callable[[random.Random], bytes], ...] = (_announced, _small_values, _many_lists, _deep, _big)
