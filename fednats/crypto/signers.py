"""Whose signatures count in a run: ``signers.toml`` has the public keys of all participants and is in every kit.

The file is read again when it changes, so a revoked signer is refused at once, without restarting a daemon.
"""

from pathlib import Path
from typing import Annotated

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import AfterValidator, Field

from fednats import subjects
from fednats.config import Settings, Token, load
from fednats.crypto.signing import public_key, verified
from fednats.errors import ConfigError, Reason, RefusedError
from fednats.permissions import user_name


def _is_public_key(nkey: str) -> str:
    public_key(nkey)
    return nkey


PublicNkey = Annotated[str, AfterValidator(_is_public_key)]


class SignersFile(Settings):
    """``signers.toml``: the public nkeys of ``site.NAME``, ``aggregator.REGION`` and ``coordinator.hub``."""

    run: Token
    epoch: int = Field(ge=1, description="of the keys that encrypt updates and seal models: counts their rotations")
    keys: dict[str, PublicNkey]
    revoked: dict[str, tuple[PublicNkey, ...]] = Field(
        {}, description="all keys that are refused, whatever else is said of them, by whose they were; the newest last"
    )

    @property
    def refused(self) -> frozenset[str]:
        """All revoked keys."""
        return frozenset(key for keys in self.revoked.values() for key in keys)


class Signers:
    """The keys of one run's participants, as last read from the file."""

    def __init__(self, path: Path, run: str) -> None:
        """Read ``path``. Raises ConfigError: it cannot be read, or belongs to another run."""
        self._path = path
        self._run = run
        self._stamp = _stamp(path)
        self._take(_read(path, run))

    @property
    def roster(self) -> SignersFile:
        """The file as last read."""
        return self._roster

    def reread(self) -> bool:
        """Read the file again if it has changed; return whether it had.

        Raises:
            ConfigError: it cannot be read; the previous content stays in force.
        """
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return False
        self._take(_read(self._path, self._run))
        self._stamp = stamp
        return True

    def opened(self, subject: str, data: bytes) -> bytes:
        """Verify a signed message from ``subject`` and return the packed message.

        Raises:
            RefusedError: ``signature``: not signed by the participant that may publish there, or its key is unknown or
                revoked.
        """
        signer = signer_of(subject)
        key = self._keys.get(signer)
        if key is None:
            known = "revoked" if signer in self._roster.revoked else "not among the signers of the run"
            raise RefusedError(Reason.SIGNATURE, f"{signer} is {known}")
        return verified(key, subject, data)

    def _take(self, roster: SignersFile) -> None:
        self._roster = roster
        self._keys: dict[str, Ed25519PublicKey] = {
            name: public_key(nkey) for name, nkey in roster.keys.items() if nkey not in roster.refused
        }


def signer_of(subject: str) -> str:
    """Return the participant that must have signed messages on ``subject``.

    >>> signer_of("fed.r.update.north.a.head"), signer_of("fed.r.receipt.north.a"), signer_of("fed.r.control")
    ('site.a', 'aggregator.north', 'coordinator.hub')
    """
    name = subjects.sender(subject)
    if name == subjects.HUB:
        return user_name("coordinator", name)
    of_region = subject.split(".")[2] in {"aggregate", "composition", "receipt"}
    return user_name("aggregator" if of_region else "site", name)


def read_roster(path: Path) -> SignersFile:
    """Read a ``signers.toml``. Raises ConfigError that says what is wrong with it."""
    return load(path, SignersFile, environment={})


def _read(path: Path, run: str) -> SignersFile:
    roster = read_roster(path)
    if roster.run != run:
        raise ConfigError(f"signers_file: {path} is of run {roster.run!r}, this is {run!r}; give this run's")
    return roster


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
