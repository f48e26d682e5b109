"""Model versions as keyframes and quantised differences, as in video.

A difference is int8 multiples of one step per tensor. The coordinator takes the rounded weights for its own model, so
what rounding leaves out goes into the next difference (error feedback, Karimireddy et al. 2019, arXiv:1901.09847; for
server to clients, Tang et al. 2019, "DoubleSqueeze", arXiv:1905.05957). Steps are powers of two, so ``integer * step``
is exact and everybody's weights are the same to the bit.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fednats.errors import Reason, RefusedError
from fednats.messages import Frame

QMAX = 127

VALUE_BYTES = 4
"""Bytes per weight in a keyframe."""

RESOLUTION = 2.0
"""Root mean square of a tensor's difference, in steps: 3.3 bits a value after zstd; rounding noise 2 % of its power."""

_MIN_STEP_LOG2, _MAX_STEP_LOG2 = -100, 100  # far from the limits of float32, so multiples neither vanish nor overflow


def steps(mean_squares: NDArray[np.float64]) -> tuple[float, ...]:
    """Choose one step per tensor for a difference with these mean squares, float64[n_tensors].

    >>> steps(np.array([1.0, 0.0, 0.0625]))
    (0.5, 7.888609052210118e-31, 0.125)
    """
    return tuple(_power_of_two(math.sqrt(value) / RESOLUTION) for value in mean_squares)


def difference(target: NDArray[np.float32], base: NDArray[np.float32], step: NDArray[np.float32]) -> NDArray[np.int8]:
    """Round ``target - base`` to multiples of ``step``, int8[n], clipped to ±127; the arguments are float32[n]."""
    multiples = target - base
    multiples /= step
    np.rint(multiples, out=multiples)
    np.clip(multiples, -QMAX, QMAX, out=multiples)
    return multiples.astype(np.int8)


def follow(base: NDArray[np.float32], multiples: NDArray[np.int8], step: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return ``base + multiples * step``, float32[n]: the same to the bit wherever it is computed.

    >>> follow(np.float32([1.0, 2.0]), np.int8([3, -1]), np.float32([0.5, 0.25])).tolist()
    [2.5, 1.75]
    """
    moved: NDArray[np.float32] = base + multiples * step
    return moved


def cheapest(
    frames: Sequence[Frame], held: int, version: int, fetched: Mapping[str, int] | None = None
) -> tuple[Frame, ...]:
    """Choose the frames that lead to ``version`` with the fewest bytes to fetch, in order.

    Args:
        frames: available frames.
        held: version whose weights are already held, -1 for none. If it is ``version``, no frames are needed.
        version: wanted version.
        fetched: bytes already fetched, by payload id.

    Raises:
        RefusedError: ``checksum``: no chain of frames leads to ``version``.
    """
    differences = {frame.version: frame for frame in frames if not frame.is_keyframe}
    starts = [(frame.version, (frame,)) for frame in frames if frame.is_keyframe and frame.version <= version]
    chains = []
    for start, chain in [*starts, (held, ())]:
        reached = start
        following = list(chain)
        while 0 <= reached < version and reached + 1 in differences:  # no range(): an untrusted version may be huge
            reached += 1
            following.append(differences[reached])
        if reached == version:
            chains.append(tuple(following))
    if not chains:
        known = ", ".join(f"{'key' if frame.is_keyframe else ''}{frame.version}" for frame in frames[-40:]) or "none"
        raise RefusedError(Reason.CHECKSUM, f"no way from version {held} to {version} over the frames {known}")
    here = fetched or {}
    return min(chains, key=lambda chain: sum(_cost(frame, here) for frame in chain))


def _cost(frame: Frame, fetched: Mapping[str, int]) -> int:
    return max(0, frame.payload.n_bytes - fetched.get(frame.payload.payload_id, 0))


def _power_of_two(value: float) -> float:
    exponent = round(math.log2(value)) if value > 0 else _MIN_STEP_LOG2
    return float(2.0 ** min(max(exponent, _MIN_STEP_LOG2), _MAX_STEP_LOG2))
