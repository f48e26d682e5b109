"""The site's side: turns a delta into encrypted chunks, one at a time.

``delta + residual -> top-k (cipher none) -> stochastic rounding -> fields in slots -> BFV -> chunk``

With ``delta.dp``, clipping, rounding towards zero and noise (`fednats.privacy.skellam`) replace stochastic rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fednats import wire
from fednats.codec import sparse
from fednats.codec.layout import Layout, Vector, blocks
from fednats.codec.packing import Packing
from fednats.codec.quantiser import Quantised, quantise
from fednats.config import DeltaSettings
from fednats.crypto.public import PublicKey
from fednats.delta import scheme
from fednats.errors import LocalDataError
from fednats.messages import Chunk, Grid


@dataclass(frozen=True)
class EncodedChunk:
    """One chunk of an update, and the residual it leaves for the next update."""

    data: bytes
    """A packed `fednats.messages.Chunk`."""
    start: int
    stop: int
    """The chunk carries values ``start`` to ``stop`` of the flat vector."""
    values: NDArray[np.int8]
    """int8[stop - start]: the chunk's values in steps of the grid, for the site itself only."""
    residual: NDArray[np.float32]
    """float32[stop - start]; keep it once the update is safe in the outbox."""
    n_saturated: int
    """Values that the grid clipped."""


class Encrypter(Protocol):
    """Turns quantised values into the parts of a chunk."""

    def parts(self, values: NDArray[np.int8]) -> tuple[bytes, ...]:
        """Encode int8[up to values_per_chunk]."""

    def count_parts(self, counts: NDArray[np.int64]) -> tuple[bytes, ...]:
        """Encode int64[up to counts_per_chunk]; raises `LocalDataError` for a count that is too large."""


class Rounding(Protocol):
    """Turns real values into integers on the grid."""

    def __call__(self, values: NDArray[np.float32], steps: NDArray[np.float32], qmax: int, /) -> Quantised:
        """Round ``values`` float32[n] to multiples of ``steps`` float32[n], at most ``qmax`` steps either way."""


class Encoder:
    """Encodes deltas for one run."""

    def __init__(self, settings: DeltaSettings, cipher: Encrypter, key_id: str) -> None:
        self.values_per_chunk = scheme.values_per_chunk(settings)
        self._counts_per_chunk = scheme.counts_per_chunk(settings)
        self.key_id = key_id
        self._cipher = cipher
        self._qmax = scheme.qmax(settings)
        self._top_k = settings.top_k

    def encode(
        self,
        delta: Vector,
        residual: Vector,
        layout: Layout,
        grid: Grid,
        rng: np.random.Generator,
        rounding: Rounding | None = None,
    ) -> Iterator[EncodedChunk]:
        """Encode ``delta``, float32[n_parameters], plus the ``residual`` of earlier updates, chunk by chunk.

        Rounding is stochastic, with ``rng``, unless another ``rounding`` is given.

        Raises:
            LocalDataError: wrong length; or, raised at its chunk, a value that is not finite.
            RefusedError: ``wrong_grid``: the grid does not fit the layout.
        """
        if len(delta) != layout.n_parameters:
            raise LocalDataError(f"a delta of {len(delta)} values, the model has {layout.n_parameters} parameters")
        layout.steps(grid.steps, 0, 0)  # refuse a wrong grid now
        parts = blocks(layout.n_parameters, self.values_per_chunk)
        rounded = rounding or (lambda values, steps, qmax: quantise(values, steps, qmax, rng))
        return (
            self._chunk(delta, residual, layout.steps(grid.steps, part.start, part.stop), part, rounded)
            for part in parts
        )

    def encode_counts(self, counts: NDArray[np.int64]) -> tuple[bytes, ...]:
        """Encode ``counts``, int64[n], as chunks that add up with those of other sites.

        Raises:
            LocalDataError: a count is larger than a field holds.
        """
        return tuple(
            wire.pack(Chunk(parts=self._cipher.count_parts(counts[part])))
            for part in blocks(counts.size, self._counts_per_chunk)
        )

    def _chunk(
        self,
        delta: Vector,
        residual: Vector,
        steps: NDArray[np.float32],
        part: slice,
        rounding: Rounding,
    ) -> EncodedChunk:
        values = delta[part] + residual[part]
        kept = values if self._top_k == 1 else np.where(sparse.top_k_mask(values, self._top_k), values, np.float32(0))
        quantised = rounding(kept, steps, self._qmax)
        data = wire.pack(Chunk(parts=self._cipher.parts(quantised.values)))
        return EncodedChunk(
            data=data,
            start=part.start,
            stop=part.stop,
            values=quantised.values,
            residual=quantised.residual + (values - kept),
            n_saturated=quantised.n_saturated,
        )


@lru_cache(maxsize=2)  # loading a key takes as long as encrypting a chunk
def encoder(settings: DeltaSettings, public_key: bytes | None) -> Encoder:
    """Make the encoder of a run; ``cipher = "bfv"`` needs ``public_key``.

    Raises:
        ConfigError: the key is missing, invalid, contains the secret key, or was made for other settings.
    """
    if settings.cipher == "none":
        return Encoder(settings, _Plain(), scheme.KEY_ID_NONE)
    bfv = scheme.bfv(settings)
    key = PublicKey(scheme.required(public_key, "public"), bfv.parameters)
    return Encoder(settings, _Bfv(bfv, key), key.key_id)


class _Bfv:
    def __init__(self, bfv: scheme.BfvScheme, key: PublicKey) -> None:
        self._packing = bfv.packing
        self._counts = bfv.counts
        self._key = key

    def parts(self, values: NDArray[np.int8]) -> tuple[bytes, ...]:
        return self._encrypt(self._packing, values)

    def count_parts(self, counts: NDArray[np.int64]) -> tuple[bytes, ...]:
        if (largest := int(np.abs(counts).max(initial=0))) > self._counts.qmax:
            raise LocalDataError(f"{largest} test cases are counted together, at most {self._counts.qmax} can be")
        return self._encrypt(self._counts, counts)

    def _encrypt(self, packing: Packing, values: NDArray[np.signedinteger]) -> tuple[bytes, ...]:
        n = packing.n_values
        return tuple(self._key.encrypt(packing.pack(values[start : start + n])) for start in range(0, values.size, n))


class _Plain:
    def parts(self, values: NDArray[np.int8]) -> tuple[bytes, ...]:
        return sparse.encode(values)

    def count_parts(self, counts: NDArray[np.int64]) -> tuple[bytes, ...]:
        return sparse.encode(counts)
