import math

import numpy as np
import pytest
import tenseal as ts
from numpy.typing import NDArray
from tenseal import sealapi

from fednats.codec.packing import max_field
from fednats.crypto import secret
from fednats.crypto.parameters import MAX_MODULUS_BITS, choose, noise_parameter
from fednats.crypto.public import PublicKey
from fednats.crypto.secret import SecretKey
from fednats.errors import ConfigError, Reason, RefusedError

WEIGHT = 500


class Keys:
    def __init__(self, qmax: int) -> None:
        self.qmax = qmax
        self.parameters = choose(max_field=max_field(qmax, WEIGHT), max_total_weight=WEIGHT)
        self.secret_bytes, self.public_bytes = secret.generate(self.parameters)
        self.public = PublicKey(self.public_bytes, self.parameters)
        self.secret = SecretKey(self.secret_bytes, self.parameters)

    @property
    def largest_slot(self) -> int:
        """Largest slot of one update."""
        fields = range(self.parameters.n_fields)
        return sum(2 * self.qmax << (self.parameters.field_bits * field) for field in fields)

    def slots(self, seed: int) -> NDArray[np.int64]:
        rng = np.random.default_rng(seed)
        slots: NDArray[np.int64] = rng.integers(
            0, self.largest_slot, self.parameters.poly_modulus_degree, endpoint=True
        )
        slots[0] = self.largest_slot
        return slots

    def noise_budget_bits(self, ciphertext: bytes) -> int:
        context = self.secret._format._context
        decryptor = sealapi.Decryptor(context.seal_context().data, context.secret_key().data)
        return int(decryptor.invariant_noise_budget(self.secret._format.read(ciphertext).ciphertext()[0]))


@pytest.fixture(scope="module", params=[127, 7], ids=["8-bit", "4-bit"])
def keys(request: pytest.FixtureRequest) -> Keys:
    return Keys(request.param)


def weighted(keys: Keys, ciphertexts: list[bytes], weights: list[int]) -> bytes:
    total = keys.public.weighted_sum()
    for ciphertext, weight in zip(ciphertexts, weights, strict=True):
        total.add(ciphertext, weight)
    return total.to_bytes()


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("qmax", "max_total_weight", "bytes_per_value"),
    [(127, 500, 5.75), (127, 513, 5.83), (127, 4000, 6.75), (7, 64, 3.125), (7, 500, 4.375), (127, 16_000_000, 16.25)],
)
def test_parameters_are_secure_never_fail_and_carry_the_sum(
    qmax: int, max_total_weight: int, bytes_per_value: float
) -> None:
    parameters = choose(max_field=max_field(qmax, max_total_weight), max_total_weight=max_total_weight)
    assert sum(parameters.coeff_mod_bit_sizes) <= sealapi.CoeffModulus.MaxBitCount(
        parameters.poly_modulus_degree, sealapi.SEC_LEVEL_TYPE.TC128
    )
    assert parameters.failure_log2 < -40
    assert 0 <= parameters.margin_bits < 2
    largest = sum(2 * qmax * max_total_weight << (parameters.field_bits * f) for f in range(parameters.n_fields))
    assert largest < parameters.plain_modulus
    assert parameters.plain_modulus % (2 * parameters.poly_modulus_degree) == 1
    assert parameters.ciphertext_bytes / parameters.values_per_ciphertext == pytest.approx(bytes_per_value, abs=0.005)


def test_the_security_table_is_seals() -> None:
    for degree, bits in MAX_MODULUS_BITS.items():
        assert bits == sealapi.CoeffModulus.MaxBitCount(degree, sealapi.SEC_LEVEL_TYPE.TC128)


def test_no_parameters_name_the_remedy() -> None:
    with pytest.raises(ConfigError, match="lower max_total_weight or value_bits"):
        choose(max_field=2**61, max_total_weight=2**55)


# --- noise -----------------------------------------------------------------------------------------------------------


def test_measured_noise_obeys_the_bound_that_the_parameters_are_proven_with(keys: Keys) -> None:
    parameters = keys.parameters
    n_ciphertexts = 8
    worst = max(measured_noise(keys, keys.public.encrypt(keys.slots(seed))) for seed in range(n_ciphertexts))
    parameter = noise_parameter(parameters.poly_modulus_degree)
    n = n_ciphertexts * parameters.poly_modulus_degree
    # the largest of n sub-Gaussian coefficients; 2^-20 that a sound implementation exceeds it
    assert worst < parameter * math.sqrt(2 * math.log(2 * n * 2**20))
    assert worst > parameter  # and the bound is no fantasy
    # decryption fails at a noise of q/2t. The whole weight on one update stays 8.6 parameters clear of it, and
    # 2N exp(-8.6^2 / 2) < 2^-40; the bound in use is stricter, it is for whole models of ciphertexts
    threshold = parameters._threshold()
    assert threshold > 8.6 * WEIGHT * parameter
    # half of it is 7.58 deviations of the noise of a secret with as many 0 as 1 and -1, sqrt((1 + 2N/3) / 12): the largest
    # of n is beyond that with a probability of 1e-9, and beyond half of a threshold that is one bit lower as a rule
    assert threshold > 2 * WEIGHT * worst


def measured_noise(keys: Keys, ciphertext: bytes) -> float:
    """Largest noise coefficient, by the smallest multiple of the ciphertext that leaves no noise budget."""
    low, high = 1, 2**20
    while high - low > 1:
        middle = (low + high) // 2
        exhausted = keys.noise_budget_bits(weighted(keys, [ciphertext], [middle])) == 0
        low, high = (low, middle) if exhausted else (middle, high)
    # SEAL: the budget is 0 from t * noise >= 2^(bits of q - 2)
    return 2.0 ** (keys.parameters.modulus_bits - 2) / keys.parameters.plain_modulus / high


@pytest.mark.parametrize(
    "weights",
    [[WEIGHT], [1, WEIGHT - 1], [1] * WEIGHT, [250, 250], [100] * 5],
    ids=["one update", "one and the rest", "every update alone", "two halves", "five"],
)
def test_the_worst_admitted_sum_decrypts_with_noise_budget_left(keys: Keys, weights: list[int]) -> None:
    # repeating few ciphertexts adds their noise in step, which is the worst case
    slots = [keys.slots(seed) for seed in range(3)]
    encrypted = [keys.public.encrypt(each) for each in slots]
    total = weighted(keys, [encrypted[index % 3] for index in range(len(weights))], weights)
    assert keys.noise_budget_bits(total) >= 1
    expected = np.sum([weight * slots[index % 3] for index, weight in enumerate(weights)], axis=0)
    np.testing.assert_array_equal(keys.secret.decrypt(total), expected)


def test_two_tiers_of_sums_decrypt_with_noise_budget_left(keys: Keys) -> None:
    slots = [keys.slots(seed) for seed in range(4)]
    encrypted = [keys.public.encrypt(each) for each in slots]
    region = [weighted(keys, encrypted[:2], [7, 13]), weighted(keys, encrypted[2:], [19, 1])]
    total = weighted(keys, region, [10, 15])  # (20 * 10) + (20 * 15) = 500
    assert keys.noise_budget_bits(total) >= 1
    expected = np.sum([w * s for w, s in zip([70, 130, 285, 15], slots, strict=True)], axis=0)
    np.testing.assert_array_equal(keys.secret.decrypt(total), expected)


def test_a_weight_larger_than_a_prime_is_no_special_case() -> None:
    weight = 16_000_000
    parameters = choose(max_field=max_field(127, weight), max_total_weight=weight)
    assert min(parameters.coeff_mod_bit_sizes) < weight.bit_length()
    secret_bytes, public_bytes = secret.generate(parameters)
    total = PublicKey(public_bytes, parameters).weighted_sum()
    slots = np.random.default_rng(0).integers(0, 254, parameters.poly_modulus_degree, endpoint=True)
    total.add(PublicKey(public_bytes, parameters).encrypt(slots), weight)
    np.testing.assert_array_equal(SecretKey(secret_bytes, parameters).decrypt(total.to_bytes()), weight * slots)


def test_far_beyond_the_admitted_weight_decryption_does_fail(keys: Keys) -> None:
    total = weighted(keys, [keys.public.encrypt(np.ones_like(keys.slots(0)))], [WEIGHT * 64])
    assert keys.noise_budget_bits(total) == 0
    assert (keys.secret.decrypt(total) != WEIGHT * 64).any()


# --- ciphertexts -----------------------------------------------------------------------------------------------------


def test_a_ciphertext_has_exactly_the_bits_of_its_coefficients(keys: Keys) -> None:
    assert len(keys.public.encrypt(keys.slots(0))) == keys.parameters.ciphertext_bytes


def test_encrypting_twice_gives_different_ciphertexts(keys: Keys) -> None:
    assert keys.public.encrypt(keys.slots(0)) != keys.public.encrypt(keys.slots(0))


def test_slots_out_of_range_are_not_encrypted(keys: Keys) -> None:
    for bad in (-1, keys.parameters.plain_modulus):
        slots = keys.slots(0)
        slots[5] = bad
        with pytest.raises(ValueError, match="slots have to be"):
            keys.public.encrypt(slots)


def damaged(name: str, good: bytes) -> bytes:
    if name == "coefficient out of range":
        return good[:100] + b"\xff" * 1000 + good[1100:]
    if name == "not encrypted":
        return good[: len(good) // 2] + bytes(len(good) // 2)
    return {"empty": b"", "truncated": good[:-1], "longer": good + b"\x00", "zeros": bytes(len(good))}[name]


@pytest.mark.parametrize(
    "damage", ["empty", "truncated", "longer", "zeros", "coefficient out of range", "not encrypted"]
)
def test_bytes_that_are_no_ciphertext_are_refused_and_leave_the_sum_alone(keys: Keys, damage: str) -> None:
    good = keys.public.encrypt(keys.slots(0))
    total = keys.public.weighted_sum()
    total.add(good, 3)
    for each in (total, keys.public.weighted_sum()):
        with pytest.raises(RefusedError) as refused:
            each.add(damaged(damage, good), 1)
        assert refused.value.reason is Reason.CIPHERTEXT
    np.testing.assert_array_equal(keys.secret.decrypt(total.to_bytes()), 3 * keys.slots(0))


def test_a_ciphertext_and_its_negative_make_no_plaintext_sum(keys: Keys) -> None:
    good = keys.public.encrypt(keys.slots(0))
    form = keys.public._format
    negative = form.write(form.read(good) * -1)
    total = keys.public.weighted_sum()
    total.add(good, 1)
    with pytest.raises(RefusedError) as refused:
        total.add(negative, 1)
    assert refused.value.reason is Reason.CIPHERTEXT


# --- keys ------------------------------------------------------------------------------------------------------------


def test_both_halves_of_a_pair_have_one_id(keys: Keys) -> None:
    assert keys.public.key_id == keys.secret.key_id
    assert keys.public.key_id != Keys(keys.qmax).public.key_id


def test_a_public_key_with_the_secret_in_it_is_refused(keys: Keys) -> None:
    with pytest.raises(ConfigError, match="contains the secret key"):
        PublicKey(keys.secret_bytes[16:], keys.parameters)


def test_files_that_are_no_keys_are_refused(keys: Keys) -> None:
    for data in (b"", b"hello", keys.public_bytes[:1000], keys.secret_bytes):
        with pytest.raises(ConfigError):
            PublicKey(data, keys.parameters)
    with pytest.raises(ConfigError, match="no secret key"):
        SecretKey(bytes(16) + keys.public_bytes, keys.parameters)


def test_a_key_for_other_settings_is_refused(keys: Keys) -> None:
    other = choose(max_field=max_field(keys.qmax, 4000), max_total_weight=4000)
    with pytest.raises(ConfigError, match="generate a new pair"):
        PublicKey(keys.public_bytes, other)
    with pytest.raises(ConfigError, match="generate a new pair"):
        SecretKey(keys.secret_bytes, other)


def test_a_key_of_another_scheme_is_refused(keys: Keys) -> None:
    ckks = ts.context(ts.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[40, 40, 40], n_threads=1)
    with pytest.raises(ConfigError, match="generate a new pair"):
        PublicKey(ckks.serialize(save_secret_key=False), keys.parameters)


def test_the_secret_is_not_in_the_public_key(keys: Keys) -> None:
    assert not ts.context_from(keys.public_bytes, n_threads=1).has_secret_key()
