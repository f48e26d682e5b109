"""Sign what a daemon publishes, and verify what it reads."""

import asyncio
from pathlib import Path
from typing import Any

from fednats import wire
from fednats.crypto.signers import Signers
from fednats.crypto.signing import Signer
from fednats.errors import ConfigError
from fednats.messages import Message
from fednats.wire import MessageT

REREAD_S = 1.0
"""Interval at which the file of signers is checked, so a revoked signer is accepted at most this much longer."""


class Identity:
    """Signs and verifies for one participant, whose ``name`` is as in `permissions.user_name`.

    Making or verifying a signature takes 0.1 ms on the event loop; a hop to a thread would cost as much.

    Raises:
        ConfigError: the seed or the file of signers is missing, they do not belong together, or the key is revoked.
    """

    def __init__(self, name: str, run: str, seed_file: Path | None, signers_file: Path) -> None:
        self.name = name
        self.signer = Signer.read(seed_file, "bus.nkey_seed_file")
        self._signers = Signers(signers_file, run)
        if self._is_revoked:
            raise ConfigError(f"signers_file: {signers_file} has revoked the key of {name}; ask for a new kit")
        expected = self._signers.roster.keys.get(name)
        if expected != self.signer.public_key:
            is_there = "has another key than bus.nkey_seed_file" if expected else "has no key"
            raise ConfigError(
                f"signers_file: {signers_file} {is_there} for {name}: nobody would take what it sends; give the two of one kit"
            )

    @property
    def _is_revoked(self) -> bool:
        return self.signer.public_key in self._signers.roster.refused

    @property
    def n_hospitals(self) -> int:
        """Number of sites in the federation."""
        return sum(name.startswith("site.") for name in self._signers.roster.keys)

    def sign(self, subject: str, message: Message) -> bytes:
        """Return ``message`` packed and signed, to publish on ``subject``."""
        return self.signer.sign(subject, wire.pack(message))

    def open(self, subject: str, data: bytes, expected: type[MessageT]) -> MessageT:
        """Verify that ``data`` comes from the sender that ``subject`` names, and return its message.

        Raises:
            RefusedError: ``signature``, or as `wire.unpack`.
        """
        return wire.unpack(self._signers.opened(subject, data), expected)

    async def follow_signers(self, log: Any) -> None:
        """Read the file of signers again whenever it changes, forever."""
        failed = ""
        while True:
            await asyncio.sleep(REREAD_S)
            try:
                changed = await asyncio.to_thread(self._signers.reread)
            except ConfigError as error:
                if str(error) != failed:
                    log.warning("signers_unreadable", error=str(error))
                failed = str(error)
                continue
            failed = ""
            if changed:
                roster = self._signers.roster
                log.info("signers_changed", epoch=roster.epoch, n_keys=len(roster.keys), revoked=sorted(roster.revoked))
                if self._is_revoked:
                    log.error("own_key_revoked", remedy="what is sent is refused from now on; ask for a new kit")
