"""Who a daemon is to the others, and who they are to it: what it publishes is signed, what it reads is verified first."""

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
"""How often the file of signers is looked at: so long, at most, a signer that was revoked is still taken."""


class Identity:
    """Signs and verifies for one participant, ``name`` as in `permissions.user_name`.

    A signature costs 0.1 ms, made or verified, on the event loop: a hop to a thread would cost as much.

    Raises:
        ConfigError: the seed or the file of signers is missing, or they do not belong together.
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
        """Sites that the federation has."""
        return sum(name.startswith("site.") for name in self._signers.roster.keys)

    def sign(self, subject: str, message: Message) -> bytes:
        """Return ``message`` as it is published on ``subject``."""
        return self.signer.sign(subject, wire.pack(message))

    def open(self, subject: str, data: bytes, expected: type[MessageT]) -> MessageT:
        """Return what came on ``subject``, once it is known to be from whom the subject says.

        Raises:
            RefusedError: ``signature``, or as `wire.unpack`.
        """
        return wire.unpack(self._signers.opened(subject, data), expected)

    async def follow_signers(self, log: Any) -> None:
        """Read the file of signers again whenever it changes, for ever."""
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
