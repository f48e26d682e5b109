"""The coordinator's side: turns a sum into the mean delta. No other module outside crypto reaches the secret key."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fednats import wire
from fednats.codec import sparse
from fednats.codec.layout import Layout, blocks
from fednats.codec.packing import Packing, check_total_weight
from fednats.config import DeltaSettings
from fednats.crypto.secret import SecretKey
from fednats.delta import scheme
from fednats.errors import Reason, RefusedError
from fednats.messages import Chunk, Grid


class Decrypter(Protocol):
    """Turns the parts of a chunk into weighted sums of quantised values."""

    def sums(self, parts: tuple[bytes, ...], total_weight: int, n_values: int) -> NDArray[np.int32]:
        """Decode ``n_values`` sums, plus any fields that pad the last slots. Raises RefusedError for an invalid sum."""

    def counts(self, parts: tuple[bytes, ...], n_sites: int, n_counts: int) -> NDArray[np.int32]:
        """Decode ``n_counts`` sums, plus any fields that pad the last slots. Raises RefusedError for an invalid sum."""


class Decoder:
    """Decodes sums for one run."""

    def __init__(self, settings: DeltaSettings, cipher: Decrypter, key_id: str) -> None:
        self.values_per_chunk = scheme.values_per_chunk(settings)
        self._counts_per_chunk = scheme.counts_per_chunk(settings)
        self.key_id = key_id
        self.qmax = scheme.qmax(settings)
        self.max_total_weight = settings.max_total_weight
        self._cipher = cipher

    def decode_chunk(self, data: bytes, total_weight: int, n_values: int | None = None) -> NDArray[np.int32]:
        """Return weighted sums of quantised values, int32[n_values]. By default the chunk is a full one, not the last.

        Raises:
            OverflowRefusedError: ``total_weight`` is above ``max_total_weight``.
            RefusedError: malformed, not a sum of that weight under this key, not ``n_values`` long, or its padding is
                not zero.
        """
        check_total_weight(total_weight, self.max_total_weight)
        n = self.values_per_chunk if n_values is None else n_values
        sums = self._cipher.sums(wire.unpack(data, Chunk).parts, total_weight, n)
        if sums[n:].any():
            raise RefusedError(Reason.WRONG_SHAPE, f"{np.count_nonzero(sums[n:])} unused fields are not zero")
        return sums[:n]

    def decode_counts(self, chunks: Sequence[bytes], n_sites: int, n_counts: int) -> NDArray[np.int64]:
        """Return the sums of ``n_sites`` sites' counts, int64[n_counts], from all chunks in order.

        Raises:
            OverflowRefusedError: ``n_sites`` is above ``max_total_weight``.
            RefusedError: malformed, or not a sum of ``n_sites`` sites under this key.
        """
        check_total_weight(n_sites, self.max_total_weight)
        parts = list(blocks(n_counts, self._counts_per_chunk))
        if len(chunks) != len(parts):
            raise RefusedError(Reason.WRONG_SHAPE, f"{len(chunks)} chunks for {n_counts} counts, expected {len(parts)}")
        found = np.empty(n_counts, np.int64)
        for part, chunk in zip(parts, chunks, strict=True):
            counts = self._cipher.counts(wire.unpack(chunk, Chunk).parts, n_sites, part.stop - part.start)
            unused = counts[part.stop - part.start :]
            if unused.any():
                raise RefusedError(Reason.WRONG_SHAPE, f"{np.count_nonzero(unused)} unused counts are not zero")
            found[part] = counts[: part.stop - part.start]
        return found

    def mean(self, chunks: Iterable[bytes], total_weight: int, layout: Layout, grid: Grid) -> NDArray[np.float32]:
        """Return the weighted mean delta, float32[n_parameters], from all chunks of one sum in order.

        Raises:
            OverflowRefusedError: as `decode_chunk`.
            RefusedError: as `decode_chunk`, or too many or too few chunks or values for the layout.
        """
        mean = np.empty(layout.n_parameters, dtype=np.float32)
        start = 0
        for chunk in chunks:
            stop = min(start + self.values_per_chunk, layout.n_parameters)
            if start == stop:
                raise RefusedError(Reason.WRONG_SHAPE, f"more chunks than {stop} values have")
            sums = self.decode_chunk(chunk, total_weight, stop - start)
            mean[start:stop] = sums * layout.steps(grid.steps, start, stop) / total_weight
            start = stop
        if start != layout.n_parameters:
            raise RefusedError(Reason.WRONG_SHAPE, f"chunks for {start} of {layout.n_parameters} values")
        return mean


def decoder(settings: DeltaSettings, secret_key: bytes | None) -> Decoder:
    """Make the decoder of a run; ``cipher = "bfv"`` needs ``secret_key``.

    Raises:
        ConfigError: the key is missing, invalid, or made for other settings.
    """
    if settings.cipher == "none":
        return Decoder(settings, _Plain(scheme.qmax(settings)), scheme.KEY_ID_NONE)
    bfv = scheme.bfv(settings)
    key = SecretKey(scheme.required(secret_key, "secret"), bfv.parameters)
    return Decoder(settings, _Bfv(bfv, key), key.key_id)


class _Bfv:
    def __init__(self, bfv: scheme.BfvScheme, key: SecretKey) -> None:
        self._packing = bfv.packing
        self._counts = bfv.counts
        self._key = key

    def sums(self, parts: tuple[bytes, ...], total_weight: int, n_values: int) -> NDArray[np.int32]:
        return self._decrypt(self._packing, parts, total_weight, n_values)

    def counts(self, parts: tuple[bytes, ...], n_sites: int, n_counts: int) -> NDArray[np.int32]:
        return self._decrypt(self._counts, parts, n_sites, n_counts)

    def _decrypt(self, packing: Packing, parts: tuple[bytes, ...], total_weight: int, n: int) -> NDArray[np.int32]:
        expected = -(-n // packing.n_values)
        if len(parts) != expected or not parts:
            raise RefusedError(Reason.WRONG_SHAPE, f"{len(parts)} ciphertexts for {n} values, expected {expected}")
        return np.concatenate([packing.unpack(self._key.decrypt(part), total_weight) for part in parts])


class _Plain:
    def __init__(self, qmax: int) -> None:
        self._qmax = qmax

    def sums(self, parts: tuple[bytes, ...], total_weight: int, n_values: int) -> NDArray[np.int32]:
        sums = sparse.decode(parts, n_values)
        largest = int(np.abs(sums.astype(np.int64)).max(initial=0))
        if largest > self._qmax * total_weight:
            raise RefusedError(Reason.MALFORMED, f"a sum of {largest} under total weight {total_weight}")
        return sums

    def counts(self, parts: tuple[bytes, ...], n_sites: int, n_counts: int) -> NDArray[np.int32]:  # noqa: ARG002
        return sparse.decode(parts, n_counts)
