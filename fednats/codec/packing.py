"""Packs several quantised values into one integer slot, so that adding slots adds every value.

A field holds ``value + qmax + 1``, which is at least 1. In a sum of total weight W, a field is therefore at least W: a
dither of up to W / 2 either way cannot make it borrow from the next field. Fields are wide enough for W up to
``max_total_weight``, so they do not carry either.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fednats.errors import ConfigError, OverflowRefusedError, Reason, RefusedError

_SLOT_BITS = 62


def max_field(qmax: int, max_total_weight: int) -> int:
    """Return the largest value of a field in a weighted sum; its bit length is the width of a field.

    Raises:
        ConfigError: decoded sums would not fit int32.

    >>> max_field(127, 500).bit_length(), max_field(7, 500).bit_length()
    (17, 13)
    """
    if (qmax + 1) * max_total_weight > np.iinfo(np.int32).max:
        limit = np.iinfo(np.int32).max // (qmax + 1)
        raise ConfigError(f"max_total_weight is {max_total_weight}; sums are 32-bit integers, lower it to {limit}")
    return (2 * qmax + 1) * max_total_weight + max_dither(max_total_weight)


def max_dither(total_weight: int) -> int:
    """Return the largest magnitude of a sum's dither: half a step of its mean."""
    return total_weight // 2


@dataclass(frozen=True)
class Packing:
    """``n_fields`` values per slot, ``n_slots`` slots per vector.

    >>> packing = Packing(qmax=7, max_total_weight=4, n_fields=2, n_slots=2)
    >>> slots = packing.pack(np.int8([1, -7, 3])) + 3 * packing.pack(np.int8([2, -7, -7]))
    >>> packing.unpack(slots, total_weight=4).tolist()
    [7, -28, -18, 0]
    """

    qmax: int
    max_total_weight: int
    n_fields: int
    n_slots: int

    def __post_init__(self) -> None:
        if self.n_fields * self.field_bits > _SLOT_BITS:
            raise ConfigError(f"{self.n_fields} fields of {self.field_bits} bits do not fit a slot of {_SLOT_BITS}")

    @property
    def field_bits(self) -> int:
        """Width of a field in bits."""
        return max_field(self.qmax, self.max_total_weight).bit_length()

    @property
    def n_values(self) -> int:
        """Values that one vector of slots carries."""
        return self.n_fields * self.n_slots

    def pack(self, values: NDArray[np.signedinteger]) -> NDArray[np.int64]:
        """Pack ``values``, integer[up to n_values] in [-qmax, qmax], into int64[n_slots]; absent values are zeros.

        Field f of slot s holds value ``f * n_slots + s``.
        """
        fields = np.full(self.n_values, self.qmax + 1, dtype=np.int64)
        fields[: values.size] += values
        return self._slots(fields)

    def pack_dither(self, dither: NDArray[np.int64]) -> NDArray[np.int64]:
        """Pack a dither for a sum's fields, int64[up to n_values] of either sign, into int64[n_slots]."""
        fields = np.zeros(self.n_values, dtype=np.int64)
        fields[: dither.size] = dither
        return self._slots(fields)

    def _slots(self, fields: NDArray[np.int64]) -> NDArray[np.int64]:
        slots = np.zeros(self.n_slots, dtype=np.int64)
        for field in reversed(fields.reshape(self.n_fields, self.n_slots)):
            slots <<= self.field_bits
            slots += field
        return slots

    def unpack(self, slots: NDArray[np.int64], total_weight: int) -> NDArray[np.int32]:
        """Recover weighted sums of values, int32[n_values], from a weighted sum of packed slots.

        Raises:
            OverflowRefusedError: ``total_weight`` is above ``max_total_weight``; fields may have overflowed.
            RefusedError: ``ciphertext``: a field is out of range, so the slots are not a sum of that weight, were
                encrypted for another key, or were tampered with.
        """
        check_total_weight(total_weight, self.max_total_weight)
        dither = max_dither(total_weight)
        least, most = total_weight - dither, (2 * self.qmax + 1) * total_weight + dither
        mask = (1 << self.field_bits) - 1
        fields = np.empty((self.n_fields, self.n_slots), dtype=np.int64)
        for index in range(self.n_fields):
            fields[index] = (slots >> (index * self.field_bits)) & mask
        beyond = slots >> (self.n_fields * self.field_bits)
        n_wrong = int(np.count_nonzero(((fields < least) | (fields > most)).any(axis=0) | (beyond != 0)))
        if n_wrong:
            raise RefusedError(
                Reason.CIPHERTEXT,
                f"{n_wrong} of {self.n_slots} slots are no sum of total weight {total_weight}: wrong key, or damaged",
            )
        return (fields.reshape(-1) - (self.qmax + 1) * total_weight).astype(np.int32)


def check_total_weight(total_weight: int, max_total_weight: int) -> None:
    """Refuse a total weight before the sum is computed.

    Raises:
        OverflowRefusedError: ``total_weight`` is above ``max_total_weight``, or below 1.
    """
    if not 1 <= total_weight <= max_total_weight:
        raise OverflowRefusedError(f"total weight {total_weight} is not in 1 to {max_total_weight}; nothing was added")
