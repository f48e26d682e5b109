"""Whose signature counts in a run: ``signers.toml``, the public keys of all participants, in everybody's kit.

The file is read again when it changes, so a signer that is revoked is refused at once and no daemon is started again.
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
    """``signers.toml``: participants, ``site.NAME``, ``aggregator.REGION``, ``coordinator.hub``, each with its public nkey."""

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
    """The keys of one run's participants, as the file has them now."""

    def __init__(self, path: Path, run: str) -> None:
        """Read ``path``. Raises ConfigError: it cannot be read, or is another run's."""
        self._path = path
        self._run = run
        self._stamp = _stamp(path)
        self._take(_read(path, run))

    @property
    def roster(self) -> SignersFile:
        """What the file says."""
        return self._roster

    def reread(self) -> bool:
        """Take what the file says now; whether it has changed.

        Raises:
            ConfigError: it cannot be read; what it said before goes on to hold.
        """
        stamp = _stamp(self._path)
        if stamp == self._stamp:
            return False
        self._take(_read(self._path, self._run))
        self._stamp = stamp
        return True

    def opened(self, subject: str, data: bytes) -> bytes:
        """Return the packed message of what came on ``subject``, signed by whom the bus lets publish there.

        Raises:
            RefusedError: ``signature``: it is not, or the signer is unknown or revoked.
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
    """Return the participant that must have signed what comes on ``subject``.

    >>> signer_of("fed.r.update.north.a.head"), signer_of("fed.r.receipt.north.a"), signer_of("fed.r.control")
    ('site.a', 'aggregator.north', 'coordinator.hub')
    """
    name = subjects.sender(subject)
    if name == subjects.HUB:
        return user_name("coordinator", name)
    of_region = subject.split(".")[2] in {"aggregate", "composition", "receipt"}
    return user_name("aggregator" if of_region else "site", name)


def read_roster(path: Path) -> SignersFile:
    """Read a ``signers.toml``. Raises ConfigError naming what is wrong with it."""
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
