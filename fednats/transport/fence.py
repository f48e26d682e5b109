"""A fence around a stream: what a publisher sends is stored only while the lease that it publishes under is the newest."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Fence:
    """The message of ``subject``, in the stream that is published to, that must be the newest there.

    The server compares ``sequence`` when it stores a message, and refuses that message if there is a newer one of
    ``subject`` (`fednats.errors.FencedError`).
    """

    subject: str
    sequence: int
    """0: there must be none."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What the server goes by."""
        return {
            "Nats-Expected-Last-Subject-Sequence": str(self.sequence),
            "Nats-Expected-Last-Subject-Sequence-Subject": self.subject,
        }
