"""All floating-point tensors of a model as one flat float32 vector."""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fednats.errors import Reason, RefusedError
from fednats.messages import Grid, ParameterSpec


class Layout:
    """Where each tensor lies in the flat vector.

    >>> layout = Layout((ParameterSpec(name="weight", shape=(2, 3)), ParameterSpec(name="bias", shape=(2,))))
    >>> layout.n_parameters, layout.slices[1]
    (8, slice(6, 8, None))
    >>> layout.steps(Grid(grid_id="g", steps=(0.5, 0.25)), 5, 8).tolist()
    [0.5, 0.25, 0.25]
    """

    def __init__(self, parameters: Sequence[ParameterSpec]) -> None:
        self.parameters = tuple(parameters)
        sizes = [math.prod(parameter.shape) for parameter in self.parameters]
        ends = np.cumsum(sizes, dtype=np.int64)
        self._sizes = np.array(sizes, dtype=np.int64)
        self._ends = ends
        self.n_parameters = sum(sizes)
        self.slices = tuple(slice(int(end) - size, int(end)) for end, size in zip(ends, sizes, strict=True))

    def steps(self, grid: Grid, start: int, stop: int) -> NDArray[np.float32]:
        """Quantisation step of each value of the flat vector from ``start`` to ``stop``, float32[stop - start].

        Raises:
            RefusedError: ``wrong_grid``: not one step per tensor, or a step that is not a positive float32.
        """
        if len(grid.steps) != len(self.parameters):
            raise RefusedError(Reason.WRONG_GRID, f"{len(grid.steps)} steps for {len(self.parameters)} tensors")
        lengths = np.minimum(self._ends, stop) - np.maximum(self._ends - self._sizes, start)
        steps = np.asarray(grid.steps, dtype=np.float64)
        limits = np.finfo(np.float32)
        if not ((steps >= limits.tiny) & (steps <= limits.max)).all():
            raise RefusedError(Reason.WRONG_GRID, "a step is not a positive float32")
        return np.repeat(steps.astype(np.float32), np.maximum(lengths, 0))
