"""The aggregator's side: sums chunks of several updates (or of sums) into one chunk, without decrypting them."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fednats import wire
from fednats.codec import sparse
from fednats.codec.layout import blocks
from fednats.codec.packing import Packing, check_total_weight, max_dither
from fednats.config import AggregationSettings, DeltaSettings
from fednats.crypto.public import PublicKey, WeightedSum
from fednats.delta import robust, scheme
from fednats.errors import Reason, RefusedChunkError, RefusedError
from fednats.messages import Chunk

Dither = Callable[[int, int], NDArray[np.int64]]


class Accumulator(Protocol):
    """Adds the parts of chunks, one chunk after another."""

    def add(self, parts: tuple[bytes, ...], weight: int, share: int) -> None:
        """Add ``weight`` times the values in ``parts``; ``share`` is what they add to the total weight.

        Raises:
            RefusedError: the parts are invalid.
        """

    def dither(self, noise: NDArray[np.int64]) -> None:
        """Add ``noise``, int64[n_values], to the sum."""

    def parts(self) -> tuple[bytes, ...]:
        """Return the parts of the sum."""


class Summer:
    """Sums chunks for one run."""

    def __init__(
        self, settings: DeltaSettings, bfv: scheme.BfvScheme | None = None, key: PublicKey | None = None
    ) -> None:
        self.key_id = scheme.KEY_ID_NONE if key is None else key.key_id
        self.values_per_chunk = scheme.values_per_chunk(settings)
        self.max_total_weight = settings.max_total_weight
        self._settings = settings
        self._qmax = scheme.qmax(settings)
        self._bfv = bfv
        self._key = key

    def weighted_sum(
        self,
        chunks: Sequence[bytes],
        weights: Sequence[int],
        total_weight: int,
        n_values: int | None = None,
        carried: Sequence[int] | None = None,
        dither: Dither | None = None,
    ) -> bytes:
        """Sum ``chunks`` (the same part of several updates or sums of updates), each times its integer weight.

        A weighted sum of small integers can reveal each of them: ``427 a + 44 b`` has one solution for a and b below
        128. So an encrypted sum gets a uniform ``dither`` of up to half a step of the mean of its updates. It leaves
        the mean unbiased and hides everything below its last digit. Inputs that are sums have theirs already.

        Args:
            chunks: packed `fednats.messages.Chunk`, at least one; one is decoded at a time.
            weights: one per chunk, at least 1.
            total_weight: of the result: the sum over inputs of weight times the total weight already in the input.
            n_values: values in the chunk by the layout. Without it, a BFV sum expects as many ciphertexts as the first
                chunk has (a wrong first chunk gets the others refused), and a plain sum expects a full chunk.
            carried: total weight already in each chunk, 1 for an update. Without encryption, values are checked against
                the largest it allows; if it is left out, against the largest of the whole sum.
            dither: draws the dither, int64[n], from n and the largest magnitude; needs ``n_values``. Without encryption
                none is added, since the region sees the updates themselves.

        Raises:
            OverflowRefusedError: ``total_weight`` is above ``max_total_weight``; nothing was added.
            RefusedChunkError: a chunk is malformed; ``index`` says which. Leave it out and call again.
            ValueError: not one weight of at least 1 per chunk, or ``total_weight`` below their sum.
        """
        check_total_weight(total_weight, self.max_total_weight)
        if not chunks or len(chunks) != len(weights) or min(weights) < 1 or sum(weights) > total_weight:
            raise ValueError(
                f"{len(chunks)} chunks, weights {list(weights)}, total {total_weight}: one weight from 1 per chunk, and"
                " a total that is no smaller than their sum"
            )
        accumulator = self._accumulator(total_weight, n_values)
        for index, (chunk, weight) in enumerate(zip(chunks, weights, strict=True)):
            try:
                accumulator.add(
                    wire.unpack(chunk, Chunk).parts,
                    weight,
                    total_weight if carried is None else weight * carried[index],
                )
            except RefusedError as error:
                raise RefusedChunkError(error.reason, f"chunk {index}: {error.detail}", index) from None
        if dither is not None and n_values is not None:
            inputs = zip(weights, carried or [1] * len(weights), strict=True)
            of_updates = sum(weight for weight, share in inputs if share == 1)
            accumulator.dither(dither(n_values, max_dither(of_updates)))
        return wire.pack(Chunk(parts=accumulator.parts()))

    def squares(self, chunks: Sequence[bytes], n_values: int) -> tuple[float, ...]:
        """Return each chunk's sum of squared integers; without encryption only. Raises as `robust_sum`."""
        values = self._values(chunks, n_values).astype(np.float64)
        return tuple(float(row @ row) for row in values)

    def robust_sum(
        self,
        chunks: Sequence[bytes],
        weights: Sequence[int],
        n_values: int,
        settings: AggregationSettings,
        factors: Sequence[float] = (),
    ) -> bytes:
        """Sum ``chunks``, the same part of several updates, by the rule ``settings.robust``; without encryption only.

        Args:
            chunks: packed `fednats.messages.Chunk`, at least one; all are decoded at once.
            weights: one per chunk, at least 1; median and trimmed mean use only their sum.
            n_values: values in the chunk by the layout.
            settings: the rule.
            factors: from `fednats.delta.robust.bound_norms`, for ``norm_bound``.

        Raises:
            OverflowRefusedError: the weights total more than ``max_total_weight``; nothing was added.
            RefusedChunkError: a chunk is malformed; ``index`` says which.
        """
        check_total_weight(sum(weights), self.max_total_weight)
        summed = robust.robust_sum(self._values(chunks, n_values), weights, settings, factors)
        return wire.pack(Chunk(parts=sparse.encode(summed)))

    def _values(self, chunks: Sequence[bytes], n_values: int) -> NDArray[np.int32]:
        """Decode the chunks of updates, int32[n_updates, n_values]."""
        if self._key is not None:
            raise ValueError("updates that are encrypted cannot be compared")
        values = np.empty((len(chunks), n_values), np.int32)
        for index, chunk in enumerate(chunks):
            try:
                values[index] = self._update(chunk, n_values)
            except RefusedError as error:
                raise RefusedChunkError(error.reason, f"chunk {index}: {error.detail}", index) from None
        return values

    def _update(self, chunk: bytes, n_values: int) -> NDArray[np.int32]:
        values = sparse.decode(wire.unpack(chunk, Chunk).parts, n_values)
        if (np.abs(values.astype(np.int64)) > self._qmax).any():
            raise RefusedError(Reason.MALFORMED, f"a value beyond {self._qmax}, the largest of an update")
        return values

    def sum_counts(self, inputs: Sequence[Sequence[bytes]], n_sites: Sequence[int], n_counts: int) -> tuple[bytes, ...]:
        """Sum the chunks of several evaluations, or of sums over ``n_sites`` sites each.

        Raises:
            OverflowRefusedError: more sites in total than ``max_total_weight``; nothing was added.
            RefusedChunkError: an evaluation is malformed; ``index`` says which. Leave it out and call again.
        """
        total = sum(n_sites)
        check_total_weight(total, self.max_total_weight)
        parts = blocks(n_counts, scheme.counts_per_chunk(self._settings))
        accumulators = [self._count_accumulator(part.stop - part.start, total) for part in parts]
        for index, (chunks, share) in enumerate(zip(inputs, n_sites, strict=True)):
            if len(chunks) != len(accumulators):
                text = f"{len(chunks)} chunks, expected {len(accumulators)}"
                raise RefusedChunkError(Reason.WRONG_SHAPE, text, index)
            try:
                for chunk, accumulator in zip(chunks, accumulators, strict=True):
                    accumulator.add(wire.unpack(chunk, Chunk).parts, 1, share)
            except RefusedError as error:
                raise RefusedChunkError(error.reason, error.detail, index) from None
        return tuple(wire.pack(Chunk(parts=accumulator.parts())) for accumulator in accumulators)

    def _count_accumulator(self, n_counts: int, n_sites: int) -> Accumulator:
        if self._bfv is None or self._key is None:
            return _PlainSum(np.iinfo(np.int32).max // n_sites, n_sites, n_counts)
        return _BfvSum(self._key, self._bfv.counts, n_counts)

    def _accumulator(self, total_weight: int, n_values: int | None) -> Accumulator:
        if self._bfv is None or self._key is None:
            return _PlainSum(self._qmax, total_weight, self.values_per_chunk if n_values is None else n_values)
        return _BfvSum(self._key, self._bfv.packing, n_values)


@lru_cache(maxsize=2)  # loading a key takes as long as adding a chunk
def summer(settings: DeltaSettings, public_key: bytes | None) -> Summer:
    """Make the summer of a run; ``cipher = "bfv"`` needs ``public_key``.

    Raises:
        ConfigError: the key is missing, invalid, contains the secret key, or was made for other settings.
    """
    if settings.cipher == "none":
        return Summer(settings)
    bfv = scheme.bfv(settings)
    return Summer(settings, bfv, PublicKey(scheme.required(public_key, "public"), bfv.parameters))


class _BfvSum:
    def __init__(self, key: PublicKey, packing: Packing, n_values: int | None) -> None:
        self._key = key
        self._packing = packing
        self._n_ciphertexts = None if n_values is None else -(-n_values // packing.n_values)
        self._sums: list[WeightedSum] = []

    def add(self, parts: tuple[bytes, ...], weight: int, _share: int) -> None:
        expected = max(1, len(parts)) if self._n_ciphertexts is None else self._n_ciphertexts
        if len(parts) != expected:
            raise RefusedError(Reason.WRONG_SHAPE, f"{len(parts)} ciphertexts, expected {expected}")
        if not self._sums:
            self._n_ciphertexts = expected
            self._sums = [self._key.weighted_sum() for _ in parts]
        for index, (ciphertext, total) in enumerate(zip(parts, self._sums, strict=True)):
            try:
                total.add(ciphertext, weight)
            except RefusedError as error:
                raise RefusedError(error.reason, f"ciphertext {index}: {error.detail}") from None

    def dither(self, noise: NDArray[np.int64]) -> None:
        n = self._packing.n_values
        for index, total in enumerate(self._sums):
            total.add_plain(self._packing.pack_dither(noise[index * n : (index + 1) * n]))

    def parts(self) -> tuple[bytes, ...]:
        return tuple(total.to_bytes() for total in self._sums)


class _PlainSum:
    def __init__(self, qmax: int, total_weight: int, n_values: int) -> None:
        self._qmax = qmax
        self._limit = qmax * total_weight
        self._sum = np.zeros(n_values, dtype=np.int64)

    def add(self, parts: tuple[bytes, ...], weight: int, share: int) -> None:
        term = sparse.decode(parts, self._sum.size).astype(np.int64) * weight
        largest, limit = int(np.abs(term).max(initial=0)), self._qmax * share
        if largest > limit:
            raise RefusedError(
                Reason.MALFORMED, f"a weighted value of {largest}, what brings a weight of {share} has at most {limit}"
            )
        self._sum += term

    def dither(self, noise: NDArray[np.int64]) -> None:
        """Add nothing: without encryption, the aggregator sees the updates anyway."""

    def parts(self) -> tuple[bytes, ...]:
        if np.abs(self._sum).max(initial=0) > self._limit:
            raise RefusedError(Reason.MALFORMED, f"inputs that together exceed the largest possible sum, {self._limit}")
        return sparse.encode(self._sum)
