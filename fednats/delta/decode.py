"""The coordinator's side: a sum in, the mean delta out. The only module outside crypto that reaches the secret key."""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fednats import wire
from fednats.codec import sparse
from fednats.codec.layout import Layout
from fednats.codec.packing import check_total_weight
from fednats.config import DeltaSettings
from fednats.crypto.secret import SecretKey
from fednats.delta import scheme
from fednats.errors import Reason, RefusedError
from fednats.messages import Chunk, Grid


class Cipher(Protocol):
    """The parts of a chunk to weighted sums of quantised values."""

    def sums(self, parts: tuple[bytes, ...], total_weight: int, n_values: int) -> NDArray[np.int32]:
        """Decode a chunk of ``n_values``; raises `RefusedError` for parts that are no such sum of that weight."""


class Decoder:
    """Decodes sums for one run."""

    def __init__(self, settings: DeltaSettings, cipher: Cipher, key_id: str) -> None:
        self.values_per_chunk = scheme.values_per_chunk(settings)
        self.key_id = key_id
        self.qmax = scheme.qmax(settings)
        self.max_total_weight = settings.max_total_weight
        self._cipher = cipher

    def decode_chunk(self, data: bytes, total_weight: int, n_values: int | None = None) -> NDArray[np.int32]:
        """Weighted sums of quantised values, int32[n_values]; ``n_values`` is that of every chunk but the last.

        Raises:
            OverflowRefusedError: ``total_weight`` is above ``max_total_weight``.
            RefusedError: malformed, no sum of that weight under this key, or not of ``n_values``: what lies beyond them
                has to be zeros.
        """
        check_total_weight(total_weight, self.max_total_weight)
        n = self.values_per_chunk if n_values is None else n_values
        sums = self._cipher.sums(wire.unpack(data, Chunk).parts, total_weight, n)
        if sums[n:].any():
            raise RefusedError(Reason.WRONG_SHAPE, f"{np.count_nonzero(sums[n:])} unused fields are not zero")
        return sums[:n]

    def mean(self, chunks: Iterable[bytes], total_weight: int, layout: Layout, grid: Grid) -> NDArray[np.float32]:
        """Weighted mean delta, float32[n_parameters], from all chunks of one sum in order.

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
    """The decoder of a run; ``secret_key`` is needed for ``cipher = "bfv"``.

    Raises:
        ConfigError: the key is missing, is none or was made for other settings.
    """
    if settings.cipher == "none":
        return Decoder(settings, _Plain(scheme.qmax(settings)), scheme.KEY_ID_NONE)
    bfv = scheme.bfv(settings)
    key = SecretKey(scheme.required(secret_key, "secret"), bfv.parameters)
    return Decoder(settings, _Bfv(bfv, key), key.key_id)


class _Bfv:
    def __init__(self, bfv: scheme.BfvScheme, key: SecretKey) -> None:
        self._packing = bfv.packing
        self._key = key

    def sums(self, parts: tuple[bytes, ...], total_weight: int, n_values: int) -> NDArray[np.int32]:
        expected = -(-n_values // self._packing.n_values)
        if len(parts) != expected or not parts:
            raise RefusedError(
                Reason.WRONG_SHAPE, f"{len(parts)} ciphertexts for {n_values} values, expected {expected}"
            )
        return np.concatenate([self._packing.unpack(self._key.decrypt(part), total_weight) for part in parts])


class _Plain:
    def __init__(self, qmax: int) -> None:
        self._qmax = qmax

    def sums(self, parts: tuple[bytes, ...], total_weight: int, n_values: int) -> NDArray[np.int32]:
        sums = sparse.decode(parts, n_values)
        largest = int(np.abs(sums.astype(np.int64)).max(initial=0))
        if largest > self._qmax * total_weight:
            raise RefusedError(Reason.MALFORMED, f"a sum of {largest} under total weight {total_weight}")
        return sums
