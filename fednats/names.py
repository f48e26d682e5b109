"""Names of runs, regions and hospitals. Each is a token of NATS subjects, a folder and a name in certificates."""

import re
import unicodedata
from typing import Annotated

from pydantic import AfterValidator

from fednats.errors import ConfigError

MAX_CHARACTERS = 64

_ALLOWED = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_-]{{0,{MAX_CHARACTERS - 1}}}")
_SPELT = str.maketrans(
    {"ä": "ae", "ö": "oe", "ü": "ue", "Ä": "Ae", "Ö": "Oe", "Ü": "Ue", "ß": "ss"}
    | {"æ": "ae", "Æ": "Ae", "ø": "oe", "Ø": "Oe", "å": "aa", "Å": "Aa", "ł": "l", "Ł": "L", "đ": "d", "Đ": "D"}
)


def suggested(name: str) -> str:
    """Return an allowed name that reads like ``name``; empty if no character can be kept.

    >>> suggested("müller klinik"), suggested("-north"), suggested("Hôpital St. Élie"), suggested("病院")
    ('mueller-klinik', 'north', 'Hopital-St-Elie', '')
    """
    plain = unicodedata.normalize("NFKD", unicodedata.normalize("NFC", name).translate(_SPELT))
    plain = plain.encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]+", "-", plain).strip("-")[:MAX_CHARACTERS].strip("-")


def check_name(name: str) -> str:
    """Return ``name``.

    Raises:
        ValueError: the name is not allowed; the text says what is allowed, and suggests one.
    """
    if _ALLOWED.fullmatch(name):
        return name
    instead = suggested(name)
    hint = f"; take {instead!r}" if instead else ""
    raise ValueError(
        f"{name[: 2 * MAX_CHARACTERS]!r} cannot be a name: letters a to z, digits, - and _ are allowed, at most"
        f" {MAX_CHARACTERS} of them, and no - at the beginning{hint}"
    )


ChosenName = Annotated[str, AfterValidator(check_name)]
"""A name that people give to a run, a region or a hospital."""


def checked_node(user: str, node: str) -> str:
    """Return ``node``, the second half of a bus user's name. Raises ConfigError if it is not an allowed name."""
    try:
        return check_name(node)
    except ValueError as error:
        raise ConfigError(f"{user}: {error}") from None
