"""Who has which public key, and whose was revoked: what a second run of provisioning knows of the first."""

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

import tomli_w

from fednats.config import Settings, parse
from fednats.errors import ConfigError
from fednats.names import ChosenName
from fednats.provision.files import Files

SIGNING_ROLES = ("coordinator", "aggregator", "site")
FIRST_WEB_PORT = 9470


class Registry(Settings):
    """``authority/registry.toml``. Public keys only: a seed may be anywhere, also with its owner alone."""

    run: ChosenName
    epoch: int = 1
    """Counts the pairs of keys for homomorphic encryption."""
    own_pairs: bool = False
    """Whether the coordinator makes these pairs, and hands in public keys only."""
    keys: Mapping[str, str] = {}
    """By name of the bus user."""
    revoked: Mapping[str, tuple[str, ...]] = {}
    """By name of the bus user; the newest last."""
    web_ports: Mapping[str, int] = {}
    """By name of the bus user: where each service serves /metrics, on loopback. One that was given stays."""

    @classmethod
    def read(cls, path: Path, run: str) -> "Registry | None":
        """Return what is there, None if nothing is.

        Raises:
            ConfigError: it is damaged, or of another run.
        """
        if not path.exists():
            return None
        try:
            raw = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read ({error}); restore it from a copy") from error
        registry = parse(raw, cls, source=str(path))
        if registry.run != run:
            raise ConfigError(
                f"{path.parent.parent} holds the kits of {registry.run!r}, not of {run!r}; give another --out"
            )
        return registry

    def write(self, path: Path, files: Files) -> None:
        """Write it for the next run."""
        files.public(path, tomli_w.dumps(self.model_dump(mode="json")).encode())

    def with_key(self, name: str, key: str) -> "Registry":
        """Return a copy in which ``name`` has ``key``.

        Raises:
            ConfigError: the name has another key, or the key is another's or was revoked.
        """
        if holder := next((other for other, theirs in self.keys.items() if theirs == key and other != name), None):
            raise ConfigError(f"{name}={key}: that is the key of {holder}; each needs its own")
        if holder := next((other for other, theirs in self.revoked.items() if key in theirs), None):
            raise ConfigError(f"{name}={key}: that key of {holder} was revoked; make a new one with `fednats keys new`")
        if self.keys.get(name, key) != key:
            raise ConfigError(f"{name} has the key {self.keys[name]} already; --revoke it before it gets another")
        return self.model_copy(update={"keys": {**self.keys, name: key}})

    def without(self, name: str) -> "Registry":
        """Return a copy in which the key of ``name`` is revoked."""
        kept = {other: key for other, key in self.keys.items() if other != name}
        revoked = {**self.revoked, name: (*self.revoked.get(name, ()), self.keys[name])}
        return self.model_copy(update={"keys": kept, "revoked": revoked})

    def with_web_ports(self, services: Iterable[str]) -> "Registry":
        """Return a copy in which each of ``services`` has a port that no other has: they may all be on one machine."""
        ports = dict(self.web_ports)
        for name in services:
            ports.setdefault(name, max(ports.values(), default=FIRST_WEB_PORT - 1) + 1)
        return self.model_copy(update={"web_ports": ports})

    def signers(self) -> bytes:
        """Return ``signers.toml``: whose signatures count, and which no longer do."""
        signing = {name: key for name, key in self.keys.items() if name.partition(".")[0] in SIGNING_ROLES}
        revoked = {name: keys for name, keys in self.revoked.items() if name.partition(".")[0] in SIGNING_ROLES}
        roster = {"run": self.run, "epoch": self.epoch, "keys": signing, "revoked": revoked}
        return tomli_w.dumps(roster).encode()
