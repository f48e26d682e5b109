import numpy as np
import pytest

from fednats.codec import sparse
from fednats.errors import Reason, RefusedError


def test_top_k_keeps_the_largest_by_magnitude() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    mask = sparse.top_k_mask(values, 0.1)
    assert mask.sum() == 100
    assert np.abs(values[mask]).min() >= np.abs(values[~mask]).max()
    assert sparse.top_k_mask(values, 1.0).all()
    assert sparse.top_k_mask(values[:3], 0.01).sum() == 1


def test_a_tenth_of_the_values_takes_two_bytes_each() -> None:
    rng = np.random.default_rng(0)
    values = np.where(rng.random(65536) < 0.1, rng.integers(1, 127, 65536), 0).astype(np.int8)
    assert sum(map(len, sparse.encode(values))) < 2.01 * np.count_nonzero(values)


@pytest.mark.parametrize(("largest", "width"), [(127, 1), (-127, 1), (128, 2), (-32767, 2), (32768, 4), (2**31 - 1, 4)])
def test_values_are_as_wide_as_the_largest_needs(largest: int, width: int) -> None:
    values = np.zeros(10, dtype=np.int64)
    values[[3, 4]] = 1, largest
    gaps, numbers = sparse.encode(values)
    assert len(numbers) == 2 * width
    assert sparse.decode((gaps, numbers), 10).tolist() == values.tolist()


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (b"",),
        (b"", b"", b""),
        (b"\x00", b""),
        (b"", b"\x01"),
        (b"\x00\x00", b"\x01\x02\x03"),
        (b"\x00", b"\x01\x02\x03"),
        (b"\x0a", b"\x01"),
        (b"\xff", b""),
        (b"\x00\xff", b"\x01"),
        (b"\xff" * 70_000 + b"\x00", b"\x01"),
    ],
)
def test_a_malformed_segment_is_refused(parts: tuple[bytes, ...]) -> None:
    with pytest.raises(RefusedError) as refused:
        sparse.decode(parts, 10)
    assert refused.value.reason is Reason.MALFORMED
