"""Participants of a small run with keys of their own."""

import os
from pathlib import Path

import nkeys
import tomli_w

from fednats.crypto.signing import Signer
from fednats.services.daemon.identity import Identity


def seed() -> str:
    encoded: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER)
    return encoded.decode()


class Participants:
    """Keys of a site, another site, a region and the coordinator, and the file that says so."""

    def __init__(self, directory: Path) -> None:
        self.file = directory / "signers.toml"
        self.seeds = {name: seed() for name in ("site.a", "site.b", "aggregator.north", "coordinator.hub")}
        self.directory = directory
        self.write()

    def write(self, **changes: object) -> None:
        keys = {name: Signer(text).public_key for name, text in self.seeds.items()}
        self.replace(tomli_w.dumps({"run": "r", "epoch": 1, "keys": keys, **changes}))

    def replace(self, text: str) -> None:
        """Change the file all at once: whoever reads it sees the old text or the new one."""
        new = self.file.with_suffix(".new")
        new.write_text(text)
        new.replace(self.file)

    def signer(self, name: str) -> Signer:
        return Signer(self.seeds[name])

    def identity(self, name: str) -> Identity:
        file = self.directory / f"{name}.nk"
        file.write_text(self.seeds[name])
        return Identity(name, "r", file, self.file)
