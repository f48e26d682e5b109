"""A fence around a stream: a message is stored only while the publisher's lease is the newest."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Fence:
    """A condition on publishing: the newest message of ``subject`` in the stream must have number ``sequence``.

    The server checks it before it stores a message; if ``subject`` has a newer one, it refuses
    (`fednats.errors.FencedError`).
    """

    subject: str
    sequence: int
    """0: ``subject`` must have no message."""

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers that make the server check the condition."""
        return {
            "Nats-Expected-Last-Subject-Sequence": str(self.sequence),
            "Nats-Expected-Last-Subject-Sequence-Subject": self.subject,
        }
