"""Error feedback: what rounding and dropped updates have left out so far, to be made up for by the next update."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import zstandard
from numpy.typing import NDArray

from fednats.codec.layout import Layout
from fednats.errors import LocalDataError
from fednats.storage.shared_database import SharedDatabase


@dataclass(frozen=True)
class Dropped:
    """An update that is dropped to make room; its content goes into the next one."""

    update_id: str
    steps: tuple[float, ...]
    """Steps of its grid, one per parameter tensor."""


class Residual:
    """The rest left by update ``sequence`` plus the content of ``dropped``: float32[n], added up when read."""

    def __init__(self, database: SharedDatabase, sequence: int, layout: Layout, dropped: Dropped | None) -> None:
        self._database = database
        self._sequence = sequence
        self._layout = layout
        self._dropped = dropped

    def __len__(self) -> int:
        return self._layout.n_parameters

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        """Return values ``part.start`` to ``part.stop``; raises LocalDataError if the outbox is another model's."""
        stored = self._left(part)
        values = np.zeros(part.stop - part.start, np.float32) if stored is None else stored
        if self._dropped is not None:
            quantised = self._said(self._dropped.update_id, part)
            if quantised is not None:
                values = values + quantised * self._layout.steps(self._dropped.steps, part.start, part.stop)
        return values

    def _left(self, part: slice) -> NDArray[np.float32] | None:
        """Return what rounding left out of ``part``, float32; None if nothing is stored there."""
        query = "SELECT start, data FROM residual WHERE sequence = ? AND start < ? ORDER BY start DESC"
        return self._part(query, (self._sequence, part.stop), part, lambda data: np.frombuffer(data, "<f4"))

    def _said(self, update_id: str, part: slice) -> NDArray[np.float32] | None:
        """Return an update's values in ``part`` in steps of its grid, float32; None if nothing is stored there."""
        query = "SELECT start, quantised FROM chunk WHERE update_id = ? AND start < ? ORDER BY start DESC"
        return self._part(
            query,
            (update_id, part.stop),
            part,
            lambda data: np.frombuffer(zstandard.decompress(data), np.int8).astype(np.float32),
        )

    def _part(
        self,
        query: str,
        key: tuple[int | str, int],
        part: slice,
        decode: Callable[[bytes], NDArray[np.float32]],
    ) -> NDArray[np.float32] | None:
        values = np.zeros(part.stop - part.start, np.float32)
        found = 0
        with self._database.reading() as connection:
            for start, data in connection.execute(query, key):
                stored = decode(data)
                stop = start + len(stored)
                if stop <= part.start:
                    break
                low, high = max(start, part.start), min(stop, part.stop)
                values[low - part.start : high - part.start] = stored[low - start : high - start]
                found += high - low
        if found not in {0, len(values)}:
            raise LocalDataError(
                f"{self._database.path} covers {found} of the parameters {part.start} to {part.stop}: it belongs to another"
                " model; give the new run a state_dir of its own"
            )
        return values if found else None
