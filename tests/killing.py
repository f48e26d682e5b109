"""Ciphertexts in TenSEAL's own form that end the process of whoever lets TenSEAL work with them."""

from typing import Any

import tenseal as ts

_TWO_THOUSAND_MILLION = b"\xff\xff\xff\xff\x07"  # as a varint


def kills_when_decrypted(context: Any) -> bytes:
    """An honest ciphertext that says it has two thousand million values: TenSEAL reads on behind the buffer."""
    honest, start = _honest(context)
    return b"\x0a" + bytes([len(_TWO_THOUSAND_MILLION)]) + _TWO_THOUSAND_MILLION + honest[start:]


def kills_when_added(context: Any) -> bytes:
    """An honest ciphertext under a field number that TenSEAL does not know: a vector of 4,096 values in no ciphertext."""
    honest, start = _honest(context)
    return honest[:start] + bytes([honest[start] ^ 0x40]) + honest[start + 1 :]


def _honest(context: Any) -> tuple[bytes, int]:
    honest = bytes(ts.bfv_vector(context, [1] * 4096).serialize())
    assert honest[:1] == b"\x0a", "TenSEAL 0.3 writes the number of values first"
    return honest, 2 + honest[1]
