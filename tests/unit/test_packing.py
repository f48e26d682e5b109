import numpy as np
import pytest

from fednats.codec.packing import Packing, check_total_weight, max_field
from fednats.errors import ConfigError, OverflowRefusedError, Reason, RefusedError

PACKING = Packing(qmax=127, max_total_weight=500, n_fields=3, n_slots=4)


def test_fields_do_not_run_into_each_other_at_the_limit() -> None:
    extremes = np.array([127, -127, 127, -127, -127, 127, -127, 127, 127, 127, -127, -127], dtype=np.int8)
    sums = PACKING.unpack(500 * PACKING.pack(extremes), total_weight=500)
    assert sums.dtype == np.int32
    assert sums.tolist() == (500 * extremes.astype(int)).tolist()


def test_absent_values_are_zeros() -> None:
    assert PACKING.unpack(PACKING.pack(np.array([5, -6], dtype=np.int8)), total_weight=1).tolist() == [5, -6] + [0] * 10


def test_a_total_weight_that_would_overflow_is_refused() -> None:
    with pytest.raises(OverflowRefusedError, match="501"):
        PACKING.unpack(PACKING.pack(np.array([1], dtype=np.int8)), total_weight=501)
    with pytest.raises(OverflowRefusedError):
        check_total_weight(0, 500)
    check_total_weight(500, 500)


@pytest.mark.parametrize("slot", [255, 255 << 17, 255 << 34, 1 << 51, -1])
def test_fields_out_of_range_are_refused(slot: int) -> None:
    slots = PACKING.pack(np.array([0], dtype=np.int8))
    slots[2] = slot
    with pytest.raises(RefusedError, match="1 of 4 slots") as refused:
        PACKING.unpack(slots, total_weight=1)
    assert refused.value.reason is Reason.CIPHERTEXT


def test_sums_that_do_not_fit_32_bits_name_the_limit() -> None:
    with pytest.raises(ConfigError, match="16777215"):
        max_field(127, 16_777_216)
    with pytest.raises(ConfigError, match="fields"):
        Packing(qmax=127, max_total_weight=500, n_fields=4, n_slots=4)
