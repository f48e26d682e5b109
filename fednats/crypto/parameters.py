"""Computes BFV parameters: the fewest bytes per value with which an admitted sum decrypts correctly.

A ciphertext decrypts correctly while every coefficient of its noise stays below ``q / 2t`` (``q`` the ciphertext
modulus, ``t`` the plain modulus; Fan and Vercauteren 2012, eprint 2012/144). The noise of a fresh encryption is
sub-Gaussian. In a sum whose integer weights total ``W``, its parameter is at most ``W`` times as large, however the
weights are spread. So the tail bound below holds for any admitted sum, over any number of tiers.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from tenseal import sealapi

from fednats.errors import ConfigError

SECURITY_BITS = 128
MAX_MODULUS_BITS = {4096: 109, 8192: 218}
"""Largest total bits of all coefficient primes, by poly_modulus_degree: 128-bit security against classical attacks with
ternary secrets (HomomorphicEncryption.org security standard, 2018, table 1; SEAL enforces the same)."""

FAILURE_BITS = 40
"""The probability that any ciphertext of a whole model's sum fails to decrypt is below 2^-40."""

CIPHERTEXTS_PER_SUM_BITS = 16
"""The bound covers sums of up to 2^16 ciphertexts, about 800 million values at 8 bits."""

SPECIAL_PRIME_BITS = 24
"""SEAL encrypts modulo one more prime and divides by it, so that almost only the rounding noise remains."""

_MAX_PRIME_BITS = 60
_MIN_PLAIN_BITS = 16
_MIN_PRIME_BITS = 17
_NOISE_MAX = 21  # SEAL's centred binomial noise of standard deviation 3.24 never exceeds this
_NOISE_VARIANCE = 10.5


@dataclass(frozen=True)
class Parameters:
    """BFV parameters, and how a slot is divided into fields."""

    poly_modulus_degree: int
    coeff_mod_bit_sizes: tuple[int, ...]
    """Bits of each prime. The last one is the special prime, which is not part of a ciphertext."""
    plain_modulus: int
    n_fields: int
    """Fields per slot; a ciphertext has ``poly_modulus_degree`` slots."""
    field_bits: int
    max_total_weight: int

    @property
    def modulus_bits(self) -> int:
        """Bits of one coefficient of a ciphertext."""
        return sum(self.coeff_mod_bit_sizes[:-1])

    @property
    def ciphertext_bytes(self) -> int:
        """Bytes of one ciphertext as `fednats.crypto.ciphertext` writes it: two polynomials."""
        return 2 * self.poly_modulus_degree * self.modulus_bits // 8

    @property
    def values_per_ciphertext(self) -> int:
        """Values that one ciphertext carries."""
        return self.poly_modulus_degree * self.n_fields

    @property
    def margin_bits(self) -> float:
        """Log2 of the decryption threshold over the noise bound of the worst admitted sum."""
        return math.log2(self._threshold() / self._bound())

    @property
    def failure_log2(self) -> float:
        """Upper bound on log2 P(some ciphertext of the worst admitted sum decrypts wrongly).

        >>> choose(max_field=255 * 500 + 250, max_total_weight=500).failure_log2 < -40
        True
        """
        tail = self._threshold() / (self.max_total_weight * noise_parameter(self.poly_modulus_degree))
        union_bits = 1 + math.log2(self.poly_modulus_degree) + CIPHERTEXTS_PER_SUM_BITS
        return union_bits - tail**2 / 2 / math.log(2)

    def _threshold(self) -> float:
        q = math.prod(_primes(self.poly_modulus_degree, self.coeff_mod_bit_sizes)[:-1])
        # encoding rounds q/t * m to an integer: a fixed error of up to half a unit per weight, and for the dither
        return q / (2 * self.plain_modulus) - (self.max_total_weight + 1) / 2

    def _bound(self) -> float:
        return self.max_total_weight * noise_parameter(self.poly_modulus_degree) * _tail(self.poly_modulus_degree)


def noise_parameter(poly_modulus_degree: int) -> float:
    """Return the sub-Gaussian parameter of one coefficient of a fresh encryption's noise, for any ternary secret.

    Dividing by the special prime p rounds both polynomials: 1 + N terms of variance 1/12, of which N come from the
    product with the secret. The noise before that, ``e_pk u + e_1 + e_2 s``, is divided by p.

    >>> round(noise_parameter(4096), 2)
    18.48
    """
    n = poly_modulus_degree
    before = n * _NOISE_MAX**2 + (n + 1) * _NOISE_VARIANCE
    return math.sqrt((1 + n) / 12 + before / 4 ** (SPECIAL_PRIME_BITS - 1))


def _tail(poly_modulus_degree: int) -> float:
    """Return how many sub-Gaussian parameters bound all coefficients of a sum, except with odds 2^-FAILURE_BITS."""
    union_bits = 1 + math.log2(poly_modulus_degree) + CIPHERTEXTS_PER_SUM_BITS
    return math.sqrt(2 * math.log(2) * (union_bits + FAILURE_BITS))


@lru_cache
def choose(*, max_field: int, max_total_weight: int) -> Parameters:
    """Choose the parameters with the fewest ciphertext bytes per value; on a tie, the smaller ring.

    Args:
        max_field: largest value of a field in a weighted sum.
        max_total_weight: largest sum of integer weights in one sum.

    Raises:
        ConfigError: no parameters at 128-bit security can carry these sums.

    >>> parameters = choose(max_field=255 * 500 + 250, max_total_weight=500)
    >>> parameters.poly_modulus_degree, parameters.coeff_mod_bit_sizes, parameters.n_fields, parameters.field_bits
    (4096, (52, 17, 24), 3, 17)
    """
    field_bits = max_field.bit_length()
    found = [
        parameters
        for degree in MAX_MODULUS_BITS
        for n_fields in range(1, _MAX_PRIME_BITS // field_bits + 1)
        if (parameters := _fit(degree, n_fields, max_field, max_total_weight)) is not None
    ]
    if not found:
        raise ConfigError(
            f"no BFV parameters at {SECURITY_BITS}-bit security carry sums of total weight {max_total_weight} with"
            f" fields of {field_bits} bits; lower max_total_weight or value_bits"
        )
    return min(found, key=lambda p: (p.ciphertext_bytes / p.values_per_ciphertext, p.poly_modulus_degree))


def _fit(degree: int, n_fields: int, max_field: int, max_total_weight: int) -> Parameters | None:
    field_bits = max_field.bit_length()
    max_slot = sum(max_field << (field_bits * field) for field in range(n_fields))
    plain_modulus = _plain_modulus(degree, max_slot)
    if plain_modulus is None:
        return None
    needed = 2 * plain_modulus * max_total_weight * (noise_parameter(degree) * _tail(degree) + 1 / 2)
    for modulus_bits in range(math.ceil(math.log2(needed)), MAX_MODULUS_BITS[degree] - SPECIAL_PRIME_BITS + 1):
        sizes = (*_split(modulus_bits, plain_modulus.bit_length()), SPECIAL_PRIME_BITS)
        primes = _primes(degree, sizes)
        if not primes or plain_modulus in primes:
            continue
        parameters = Parameters(degree, sizes, plain_modulus, n_fields, field_bits, max_total_weight)
        if parameters.margin_bits >= 0:
            return parameters
    return None


def _plain_modulus(degree: int, max_slot: int) -> int | None:
    """Return the smallest available batching prime (1 mod 2N) above ``max_slot``, None if there is none."""
    for bits in range(max(max_slot.bit_length(), _MIN_PLAIN_BITS), _MAX_PRIME_BITS + 1):
        try:
            prime = int(sealapi.PlainModulus.Batching(degree, bits).value())
        except RuntimeError:  # no batching prime of this size
            continue
        if prime > max_slot:
            return prime
    return None


def _primes(degree: int, sizes: tuple[int, ...]) -> list[int]:
    """Return the primes that TenSEAL takes for ``sizes``; empty if there are too few primes of a size."""
    try:
        return [int(prime.value()) for prime in sealapi.CoeffModulus.Create(degree, list(sizes))]
    except RuntimeError:
        return []


def _split(bits: int, plain_bits: int) -> list[int]:
    """Split ``bits`` over as few primes as possible, the first as large as possible but not of ``plain_bits``.

    SEAL compresses all that it writes, but soon gives up on words that are nearly full, so an uneven split takes a
    quarter less time than an even one.
    """
    sizes = []
    for primes_left in reversed(range(-(-bits // _MAX_PRIME_BITS))):
        size = min(_MAX_PRIME_BITS, bits - primes_left * _MIN_PRIME_BITS)
        sizes.append(size - 1 if primes_left and size == plain_bits else size)
        bits -= sizes[-1]
    return sizes
