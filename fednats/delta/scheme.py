"""What the run's settings mean for site, aggregator and coordinator alike: chunks, fields and parameters."""

from dataclasses import dataclass

from fednats.codec import packing, sparse
from fednats.codec.quantiser import QMAX
from fednats.config import DeltaSettings
from fednats.crypto import parameters
from fednats.errors import ConfigError

CHUNK_BYTES = 256 * 1024
"""A chunk holds as many ciphertexts as fit, at least one."""

KEY_ID_NONE = "none"
"""Key id of a run without encryption."""


@dataclass(frozen=True)
class BfvScheme:
    """Quantised values packed into the slots of BFV ciphertexts."""

    parameters: parameters.Parameters
    packing: packing.Packing

    @property
    def values_per_chunk(self) -> int:
        """Values of every chunk but the last."""
        return max(1, CHUNK_BYTES // self.parameters.ciphertext_bytes) * self.packing.n_values


def qmax(settings: DeltaSettings) -> int:
    """Largest magnitude of a quantised value.

    Raises:
        ConfigError: weighted sums would not fit int32.
    """
    largest = QMAX[settings.value_bits]
    packing.max_field(largest, settings.max_total_weight)
    return largest


def bfv(settings: DeltaSettings) -> BfvScheme:
    """The encrypted scheme of ``settings``; key generation takes its ``parameters``.

    Raises:
        ConfigError: no parameters fit the settings.

    >>> scheme = bfv(DeltaSettings())
    >>> scheme.parameters.ciphertext_bytes, scheme.packing.n_values, scheme.values_per_chunk
    (70656, 12288, 36864)
    """
    largest, weight = qmax(settings), settings.max_total_weight
    chosen = parameters.choose(max_field=packing.max_field(largest, weight), max_total_weight=weight)
    return BfvScheme(chosen, packing.Packing(largest, weight, chosen.n_fields, chosen.poly_modulus_degree))


def values_per_chunk(settings: DeltaSettings) -> int:
    """Values of every chunk of a delta but the last."""
    return bfv(settings).values_per_chunk if settings.cipher == "bfv" else sparse.SEGMENT_VALUES


def required(key: bytes | None, which: str) -> bytes:
    """``key``, or a `ConfigError` that says how to get one."""
    if key is None:
        raise ConfigError(f"cipher is 'bfv' but there is no {which} key; generate a pair and set its file")
    return key
