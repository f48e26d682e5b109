"""Chunks, fields and parameters that follow from the run's settings, the same for site, aggregator and coordinator."""

from dataclasses import dataclass

from fednats.codec import sparse
from fednats.codec.packing import Packing, max_field
from fednats.codec.quantiser import QMAX
from fednats.config import DeltaSettings
from fednats.crypto import parameters
from fednats.errors import ConfigError

COUNT_FIELDS = 2
"""Counts per slot."""

PLAIN_COUNT_BITS = 15
"""Bits of a site's count without encryption, so that sums over many sites fit 32-bit integers."""

KEY_ID_NONE = "none"
"""Key id of a run without encryption."""


@dataclass(frozen=True)
class BfvScheme:
    """Quantised values packed into the slots of BFV ciphertexts."""

    parameters: parameters.Parameters
    packing: Packing
    values_per_chunk: int
    """Values in every chunk but the last: as many ciphertexts as fit, at least one."""
    counts: Packing
    """How evaluation counts are packed: fewer and wider fields; each site's weight is 1."""


def qmax(settings: DeltaSettings) -> int:
    """Return the largest magnitude of a quantised value.

    Raises:
        ConfigError: weighted sums would not fit int32.
    """
    largest = QMAX[settings.value_bits]
    max_field(largest, settings.max_total_weight)
    return largest


def bfv(settings: DeltaSettings) -> BfvScheme:
    """Choose the encrypted scheme for ``settings``; key generation takes its ``parameters``.

    Raises:
        ConfigError: no parameters fit the settings.

    >>> scheme = bfv(DeltaSettings())
    >>> scheme.parameters.ciphertext_bytes, scheme.packing.n_values, scheme.values_per_chunk
    (70656, 12288, 36864)
    """
    largest, weight = qmax(settings), settings.max_total_weight
    chosen = parameters.choose(max_field=max_field(largest, weight), max_total_weight=weight)
    packed = Packing(largest, weight, chosen.n_fields, chosen.poly_modulus_degree)
    n_ciphertexts = max(1, settings.chunk_bytes // chosen.ciphertext_bytes)
    bits = (chosen.plain_modulus.bit_length() - 1) // COUNT_FIELDS
    counts = Packing(((1 << bits) - 1) // (2 * weight) - 1, weight, COUNT_FIELDS, chosen.poly_modulus_degree)
    return BfvScheme(chosen, packed, n_ciphertexts * packed.n_values, counts)


def counts_per_chunk(settings: DeltaSettings) -> int:
    """Return the number of counts in every chunk of an evaluation but the last."""
    if settings.cipher == "bfv":
        scheme = bfv(settings)
        return scheme.values_per_chunk // scheme.packing.n_values * scheme.counts.n_values
    return min(sparse.SEGMENT_VALUES, settings.chunk_bytes // sparse.MAX_VALUE_BYTES)


def count_bits(settings: DeltaSettings) -> int:
    """Return how many bits any one count of a site may have, sign apart."""
    return PLAIN_COUNT_BITS if settings.cipher == "none" else (bfv(settings).counts.qmax + 1).bit_length() - 1


def values_per_chunk(settings: DeltaSettings) -> int:
    """Return the number of values in every chunk of a delta but the last."""
    if settings.cipher == "bfv":
        return bfv(settings).values_per_chunk
    return min(sparse.SEGMENT_VALUES, settings.chunk_bytes // sparse.MAX_VALUE_BYTES)


def update_bytes(settings: DeltaSettings, n_parameters: int) -> int:
    """Return the largest size in bytes of an update's chunks, framing not included.

    >>> update_bytes(DeltaSettings(), 1_000_000)
    5793792
    """
    if settings.cipher == "bfv":
        scheme = bfv(settings)
        return -(-n_parameters // scheme.packing.n_values) * scheme.parameters.ciphertext_bytes
    return n_parameters * sparse.MAX_VALUE_BYTES


def required(key: bytes | None, which: str) -> bytes:
    """Return ``key``; without one, raise a `ConfigError` that says how to get it."""
    if key is None:
        raise ConfigError(f"cipher is 'bfv' but there is no {which} key; generate a pair and set its file")
    return key
