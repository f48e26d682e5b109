"""Ed25519 keys of bus users in NATS's own form (nkeys); users also sign with them."""

import os
import re
from pathlib import Path

import nkeys

from fednats.crypto import signing
from fednats.crypto.signing import Signer
from fednats.errors import ConfigError

_LINK_SEED = re.compile(r'^link_seed: "(?P<seed>\w+)"$', re.MULTILINE)


def new_seed() -> str:
    """Make a new key and return its seed."""
    seed: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return seed.decode()


def seed_text(seed: str, file: Path) -> str:
    """Return the content of ``file`` for a seed: the seed alone, or a server setting in ``link.conf``."""
    return f'link_seed: "{seed}"\n' if file.suffix == ".conf" else seed


def public_key(seed: str) -> str:
    """Return the public key of a seed.

    Raises:
        ConfigError: ``seed`` is not an nkey seed.
    """
    try:
        return Signer(seed).public_key
    except ValueError as error:
        raise ConfigError(f"not an nkey seed ({type(error).__name__}); `fednats keys new NAME` makes one") from None


def public_key_in(file: Path) -> str:
    """Return the public key of the seed in a file whose content `seed_text` made.

    Raises:
        ConfigError: the file holds no seed.
    """
    text = file.read_text(encoding="utf-8").strip()
    if file.suffix == ".conf":
        found = _LINK_SEED.search(text)
        text = found["seed"] if found else ""
    try:
        return public_key(text)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None


def check_public_key(name: str, key: str) -> str:
    """Return ``key``, handed in for the user ``name``, if it is valid.

    Raises:
        ConfigError: ``key`` is not the public key of a user: ``U`` and 55 letters and digits with a checksum.
    """
    try:
        signing.public_key(key)
    except ValueError:
        text = f"{name}={key}: not the public key of a user; give the U... that `fednats keys new` printed"
        raise ConfigError(text) from None
    return key
