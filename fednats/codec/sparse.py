"""Sparse segments for runs without encryption: the largest values and their positions.

Values that are not sent stay in the residual (sparsified SGD with memory, Stich et al. 2018, arXiv:1809.07599).
Positions are sent as gaps of one byte; ``255`` skips 255 places and carries no value. Sums of segments have the same
form with wider values, so sums can be summed again.
"""

import math

import numpy as np
from numpy.typing import NDArray

from fednats.errors import Reason, RefusedError

SEGMENT_VALUES = 65536
MAX_VALUE_BYTES = 5
"""Largest size of an entry: one byte of gap and four of value."""

_FAR = 255  # a gap byte that carries no value
_VALUE_TYPES = {1: "<i1", 2: "<i2", 4: "<i4"}


def top_k_mask(values: NDArray[np.float32], top_k: float) -> NDArray[np.bool_]:
    """Mark the ``ceil(top_k * n)`` values of largest magnitude, bool[n].

    >>> top_k_mask(np.float32([0.1, -3.0, 2.0, 0.0]), 0.5).tolist()
    [False, True, True, False]
    """
    kept = math.ceil(top_k * values.size)
    mask = np.zeros(values.size, dtype=np.bool_)
    if kept:
        mask[np.argpartition(np.abs(values), values.size - kept)[values.size - kept :]] = True
    return mask


def encode(values: NDArray[np.signedinteger]) -> tuple[bytes, bytes]:
    """Encode the non-zero entries of ``values`` (integer[n], n up to 65536) as (gaps, values).

    >>> gaps, numbers = encode(np.int32([0, 0, 5, -1]))
    >>> list(gaps), decode((gaps, numbers), 4).tolist()
    ([2, 0], [0, 0, 5, -1])
    """
    positions = np.flatnonzero(values)
    gaps = np.diff(positions, prepend=-1) - 1
    n_far, last = np.divmod(gaps, _FAR)
    coded = np.full(positions.size + int(n_far.sum()), _FAR, dtype=np.uint8)
    coded[np.cumsum(n_far + 1) - 1] = last
    numbers = values[positions]
    largest = int(np.abs(numbers.astype(np.int64)).max(initial=0))
    width = next(width for width in _VALUE_TYPES if largest < 1 << (8 * width - 1))
    return coded.tobytes(), numbers.astype(_VALUE_TYPES[width]).tobytes()


def decode(parts: tuple[bytes, ...], n_values: int) -> NDArray[np.int32]:
    """Undo `encode`: int32[n_values].

    Raises:
        RefusedError: ``malformed``: gaps and values do not match, or a position is beyond ``n_values``.
    """
    if len(parts) != 2:  # noqa: PLR2004
        raise RefusedError(Reason.MALFORMED, f"a sparse segment of {len(parts)} parts, expected gaps and values")
    if len(parts[0]) > n_values:  # each gap byte covers at least one place; check before allocating
        raise RefusedError(Reason.MALFORMED, f"a sparse segment of {len(parts[0])} gaps for {n_values} places")
    coded = np.frombuffer(parts[0], dtype=np.uint8)
    ends = np.flatnonzero(coded != _FAR)
    positions = np.cumsum(coded, dtype=np.int64)[ends] + np.arange(ends.size)
    if coded.size and coded[-1] == _FAR:
        raise RefusedError(Reason.MALFORMED, "a sparse segment whose last gap does not end")
    if positions.size and positions[-1] >= n_values:
        raise RefusedError(Reason.MALFORMED, f"a sparse segment leads to position {positions[-1]} of {n_values}")
    width, odd = divmod(len(parts[1]), max(ends.size, 1))
    if odd or (width not in _VALUE_TYPES and ends.size) or (parts[1] and not ends.size):
        raise RefusedError(Reason.MALFORMED, f"{len(parts[1])} bytes of values for {ends.size} positions")
    values = np.zeros(n_values, dtype=np.int32)
    if ends.size:
        values[positions] = np.frombuffer(parts[1], dtype=_VALUE_TYPES[width])
    return values
