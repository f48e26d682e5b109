"""What a server answers, and how it says that something is not there, full, or away."""

import json
from typing import Any

from fednats.errors import BusError, BusFullError, FencedError

_NO_STREAM = 10059
_FULL = {10023, 10028}
_NO_ROOM = 10047
_STORE_FAILED = 10077
_WRONG_LAST_SEQUENCE = 10071


class AwayError(BusError):
    """The bus did not answer: it is away or slow. Trying again is right."""


class NobodyError(BusError):
    """Nobody takes the subject: no stream, no service, or a domain that is not linked just now."""


class NoStreamError(BusError):
    """The stream does not exist."""


class NoRoomError(BusFullError):
    """The server may not promise a stream as much room as it is to have."""


def answer(data: bytes, what: str) -> dict[str, Any]:
    """Return JetStream's JSON answer.

    Raises:
        BusFullError, NoRoomError, FencedError, NoStreamError, BusError: if it says so.
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
