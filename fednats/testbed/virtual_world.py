"""The shared parts of a federation in virtual time: the clock, payloads under way, announcements."""

import heapq
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from fednats.codec.layout import Layout
from fednats.config import RunSettings
from fednats.delta.sum import summer
from fednats.messages import DIGEST_BYTES, Grid, Opening, Payload
from fednats.protocol.events import Refuse, VersionAnnounced

Weights = NDArray[np.float32]


@dataclass(frozen=True)
class PublishedVersion:
    """One published version of the model."""

    number: int
    at_s: float
    weights: Weights
    grids: tuple[Grid, ...]


class Clock:
    """Calls functions when they are due, in order of time and then of request."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = count()

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call ``call`` in ``delay_s`` seconds."""
        heapq.heappush(self._due, (self.now_s + delay_s, next(self._asked), call))

    def run(self, until_s: float) -> None:
        """Run until ``until_s``, or until nothing is due."""
        while self._due and self._due[0][0] <= until_s:
            self.now_s, _, call = heapq.heappop(self._due)
            call()


class World:
    """The state that all nodes share."""

    def __init__(self, settings: RunSettings, layout: Layout) -> None:
        self.clock = Clock()
        self.settings = settings
        self.opening = Opening(name=settings.name, first_version=0, opened_at=0)
        self.layout = layout
        self.payloads: dict[str, list[bytes]] = {}
        """Chunks of the contributions under way."""
        self.refused: list[Refuse] = []

    def keep(self, identity: str, chunks: list[bytes]) -> Payload:
        """Keep the chunks of a contribution until they are summed; return its payload."""
        self.payloads[identity] = chunks
        n_bytes = sum(len(chunk) for chunk in chunks)
        return Payload(payload_id=identity, n_bytes=n_bytes, digests=(bytes(DIGEST_BYTES),) * len(chunks))

    def refuse(self, refusal: Refuse) -> None:
        """Record a refusal and drop the contribution's chunks."""
        self.refused.append(refusal)
        self.payloads.pop(refusal.contribution_id, None)

    def announcement(self, version: PublishedVersion, capacity: int | None) -> VersionAnnounced:
        """Return the event that announces ``version`` to a collector."""
        add = summer(self.settings.delta, None)
        return VersionAnnounced(
            version=version.number,
            opening=self.opening,
            grid_ids=tuple(grid.grid_id for grid in version.grids),
            key_id=add.key_id,
            n_chunks=-(-self.layout.n_parameters // add.values_per_chunk),
            capacity=capacity,
            max_total_weight=add.max_total_weight,
            settings=self.settings.aggregation,
        )
