"""JetStream's answers, and the errors for a bus that is away or full, or lacks a stream."""

import json
from typing import Any

from fednats.errors import BusError, BusFullError, FencedError

_NO_STREAM = 10059
_FULL = {10023, 10028}
_NO_ROOM = 10047
_STORE_FAILED = 10077
_WRONG_LAST_SEQUENCE = 10071


class AwayError(BusError):
    """The bus did not answer: it is away or slow. Try again."""


class NobodyError(BusError):
    """Nobody listens on the subject: there is no such stream or service, or the link to its domain is down."""


class NoStreamError(BusError):
    """The stream does not exist."""


class NoRoomError(BusFullError):
    """The server's storage limit leaves no room for a stream of this size."""


def answer(data: bytes, what: str) -> dict[str, Any]:
    """Return JetStream's JSON answer; ``what`` names the request in error texts.

    Raises:
        BusFullError: the stream is full.
        NoRoomError: the server has no room for the stream.
        FencedError: the lease is no longer the newest.
        NoStreamError: there is no such stream.
        BusError: any other error, or the data is not an answer of JetStream.
    """
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise BusError(f"{what}: not an answer of JetStream") from None
    error = body.get("error") if isinstance(body, dict) else {"description": "not an object"}
    if not isinstance(error, dict | None):
        raise BusError(f"{what}: not an answer of JetStream")
    if not error:
        return dict(body)
    code, text = error.get("err_code"), f"{what}: {error.get('description')} ({error.get('err_code')})"
    if code == _NO_ROOM:
        raise NoRoomError(text)
    if code in _FULL or (code == _STORE_FAILED and "maximum" in text):
        raise BusFullError(text)
    if code == _WRONG_LAST_SEQUENCE:
        raise FencedError(text)
    raise NoStreamError(text) if code == _NO_STREAM else BusError(text)
