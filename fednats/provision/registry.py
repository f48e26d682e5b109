"""Record the public key of each user and all revoked keys, for later runs of provisioning."""

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
    """The content of ``authority/registry.toml``. It holds public keys only; a seed may be with its owner alone."""

    run: ChosenName
    epoch: int = 1
    """Number of the current keys for homomorphic encryption and for sealing models."""
    own_pairs: bool = False
    """Whether the coordinator makes the pairs for homomorphic encryption itself, and hands in public keys only."""
    keys: Mapping[str, str] = {}
    """Public key by name of the bus user."""
    revoked: Mapping[str, tuple[str, ...]] = {}
    """Revoked public keys by name of the bus user, the newest last."""
    web_ports: Mapping[str, int] = {}
    """Port of each service's HTTP server, on loopback, by name of the bus user. An assigned port stays."""

    @classmethod
    def read(cls, path: Path, run: str) -> "Registry | None":
        """Return the registry in the file ``path``, or None if there is no such file.

        Raises:
            ConfigError: the file is damaged, or is of another run.
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
        """Write the registry for the next run of provisioning."""
        files.public(path, tomli_w.dumps(self.model_dump(mode="json")).encode())

    def with_key(self, name: str, key: str) -> "Registry":
        """Return a copy in which ``name`` has ``key``.

        Raises:
            ConfigError: the name has another key, or the key was revoked or belongs to another user.
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
        """Return a copy in which each of ``services`` has a port of its own, as all may run on one machine."""
        ports = dict(self.web_ports)
        for name in services:
            ports.setdefault(name, max(ports.values(), default=FIRST_WEB_PORT - 1) + 1)
        return self.model_copy(update={"web_ports": ports})

    def signers(self) -> bytes:
        """Return ``signers.toml``: the keys whose signatures count, and the revoked ones."""
        signing = {name: key for name, key in self.keys.items() if name.partition(".")[0] in SIGNING_ROLES}
        revoked = {name: keys for name, keys in self.revoked.items() if name.partition(".")[0] in SIGNING_ROLES}
        roster = {"run": self.run, "epoch": self.epoch, "keys": signing, "revoked": revoked}
        return tomli_w.dumps(roster).encode()
