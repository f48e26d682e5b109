"""What one site can do to a sum with plaintext fields that nobody else sees, and what the coordinator notices.

One site of weight 1 in a sum of total weight 10 encrypts whatever it likes; the rest of the sum is honest.
"""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fednats import wire
from fednats.config import DeltaSettings
from fednats.crypto import secret
from fednats.crypto.public import PublicKey
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.sum import summer
from fednats.errors import Reason, RefusedChunkError, RefusedError
from fednats.messages import Chunk

TOTAL = 10
QMAX = 127
HONEST = 3  # steps, of every honest value: deltas are small beside the range of the grid

Slots = NDArray[np.int64]


class Federation:
    def __init__(self) -> None:
        self.settings = DeltaSettings()
        self.scheme = scheme.bfv(self.settings)
        self.packing = self.scheme.packing
        self.secret_key, self.public_key = secret.generate(self.scheme.parameters)
        self.key = PublicKey(self.public_key, self.scheme.parameters)
        self.n = self.packing.n_values
        self.modulus = self.scheme.parameters.plain_modulus

    def slots(self, value: int) -> Slots:
        return self.packing.pack(np.full(self.n, value, np.int8))

    def decoded(self, slots: Slots, n_values: int | None = None) -> NDArray[np.int32]:
        """Sum the honest rest with what the one site encrypts, as region and coordinator do."""
        n = self.n if n_values is None else n_values
        honest = np.zeros(self.n, np.int8)
        honest[:n] = HONEST
        chunks = [wire.pack(Chunk(parts=(self.key.encrypt(each),))) for each in (self.packing.pack(honest), slots)]
        summed = summer(self.settings, self.public_key).weighted_sum(chunks, [TOTAL - 1, 1], TOTAL, n)
        return decoder(self.settings, self.secret_key).decode_chunk(summed, TOTAL, n)


@pytest.fixture(scope="module")
def federation() -> Federation:
    return Federation()


def test_an_honest_site_moves_the_mean_by_its_share(federation: Federation) -> None:
    decoded = federation.decoded(federation.slots(QMAX))
    assert (decoded == HONEST * (TOTAL - 1) + QMAX).all()


@pytest.mark.parametrize("direction", [1, -1])
def test_a_site_can_move_a_coordinate_by_the_whole_range_and_nobody_sees_it(
    federation: Federation, direction: int
) -> None:
    """The bound of a coordinate is that of the sum and not of the site: ten times its share here."""
    wanted = direction * 0.9 * QMAX * TOTAL
    field = int(wanted) - HONEST * (TOTAL - 1) + QMAX  # far out of [0, 2 qmax], or negative
    slots = federation.slots(-QMAX)  # zeros in every field
    decoded = federation.decoded((slots + field) % federation.modulus)
    first = decoded.reshape(-1, federation.packing.n_slots)[0]
    assert (first == int(wanted)).all()
    assert abs(first[0]) > 5 * QMAX  # an honest site alone moves it by at most QMAX


def test_a_site_can_carry_into_the_neighbouring_field_within_its_range(federation: Federation) -> None:
    slots = federation.slots(0) + (100 << federation.packing.field_bits)
    first, second, third = federation.decoded(slots).reshape(3, -1)
    assert (first == HONEST * (TOTAL - 1)).all()
    assert (second == HONEST * (TOTAL - 1) + 100).all()
    assert (third == first).all()


def beyond_the_range(federation: Federation) -> Slots:
    return federation.slots(-QMAX) + 2 * QMAX * TOTAL


def below_zero(federation: Federation) -> Slots:
    return (federation.slots(-QMAX) - QMAX * TOTAL) % federation.modulus


def into_the_next_field(federation: Federation) -> Slots:
    return federation.slots(0) + (1 << (federation.packing.field_bits - 1))


def above_all_fields(federation: Federation) -> Slots:
    slots = federation.slots(0)
    slots[7] = federation.modulus // 2
    return slots


def one_slot_of_thousands(federation: Federation) -> Slots:
    slots = federation.slots(0)
    slots[-1] += 2 * QMAX * TOTAL
    return slots


@pytest.mark.parametrize(
    "attack", [beyond_the_range, below_zero, into_the_next_field, above_all_fields, one_slot_of_thousands]
)
def test_fields_out_of_the_sums_range_are_refused(
    federation: Federation, attack: Callable[[Federation], Slots]
) -> None:
    with pytest.raises(RefusedError, match="no sum of total weight 10") as refused:
        federation.decoded(attack(federation))
    assert refused.value.reason is Reason.CIPHERTEXT


def test_unused_fields_that_are_not_zero_are_refused(federation: Federation) -> None:
    values = np.zeros(federation.n, np.int8)
    values[-1] = 1
    with pytest.raises(RefusedError, match="1 unused fields are not zero") as refused:
        federation.decoded(federation.packing.pack(values), federation.n - 5000)
    assert refused.value.reason is Reason.WRONG_SHAPE


@pytest.mark.parametrize("n_ciphertexts", [0, 2, 50])
def test_another_number_of_ciphertexts_is_refused_before_one_is_decrypted(
    federation: Federation, n_ciphertexts: int
) -> None:
    data = wire.pack(Chunk(parts=(b"never looked at",) * n_ciphertexts))
    with pytest.raises(RefusedError, match=f"{n_ciphertexts} ciphertexts for") as refused:
        decoder(federation.settings, federation.secret_key).decode_chunk(data, TOTAL, federation.n)
    assert refused.value.reason is Reason.WRONG_SHAPE


def test_without_encryption_the_region_holds_every_update_to_its_own_bound() -> None:
    settings = DeltaSettings(cipher="none")
    honest = wire.pack(Chunk(parts=(b"\x00", np.array([QMAX], "<i1").tobytes())))
    boosted = wire.pack(Chunk(parts=(b"\x00", np.array([QMAX + 1], "<i2").tobytes())))
    add = summer(settings, None)
    assert add.weighted_sum([honest, honest], [9, 1], TOTAL, 5, [1, 1])
    with pytest.raises(RefusedChunkError, match="has at most 127") as refused:
        add.weighted_sum([honest, boosted], [9, 1], TOTAL, 5, [1, 1])
    assert refused.value.index == 1
