"""The public key, which anybody may hold: it encrypts ciphertexts, weights them and adds them."""

import hashlib
from typing import Any

import numpy as np
import tenseal as ts
from numpy.typing import NDArray

from fednats.crypto.ciphertext import CiphertextFormat
from fednats.crypto.parameters import Parameters
from fednats.errors import ConfigError, Reason, RefusedError

KEY_ID_BYTES = 16


def key_id(public_key: bytes) -> str:
    """Return the id of a public key: hexadecimal BLAKE2b-128 of its bytes."""
    return hashlib.blake2b(public_key, digest_size=KEY_ID_BYTES).hexdigest()


class PublicKey:
    """Encrypts, and starts sums of ciphertexts.

    Args:
        public_key: bytes from `fednats.crypto.secret.generate`.
        parameters: those that follow from the run's settings; the key must be made for them.

    Raises:
        ConfigError: not a key, a key for other parameters, or one that contains the secret key.
    """

    def __init__(self, public_key: bytes, parameters: Parameters) -> None:
        context = load_context(public_key)
        if context.has_secret_key():
            raise ConfigError("the public key file contains the secret key; replace it and generate a new pair")
        if not context.has_public_key():
            raise ConfigError("the public key file has no public key in it; use the one written by key generation")
        check_parameters(context, parameters)
        self.key_id = key_id(public_key)
        self._context = context
        self._format = CiphertextFormat(context)

    def encrypt(self, slots: NDArray[np.int64]) -> bytes:
        """Encrypt ``slots``, int64[poly_modulus_degree], each in [0, plain_modulus)."""
        modulus = self._format.plain_modulus
        if slots.shape != (self._format.n_slots,) or slots.min() < 0 or slots.max() >= modulus:
            raise ValueError(f"slots have to be int64[{self._format.n_slots}] in [0, {modulus})")
        # SEAL documents slots as signed, up to half the modulus in magnitude
        centred = np.where(slots > modulus // 2, slots - modulus, slots)
        return self._format.write(ts.bfv_vector(self._context, centred))

    def weighted_sum(self) -> "WeightedSum":
        """Begin a sum."""
        return WeightedSum(self._format)


class WeightedSum:
    """Adds ciphertexts one by one, each times an integer weight. Holds one ciphertext."""

    def __init__(self, ciphertext_format: CiphertextFormat) -> None:
        self._format = ciphertext_format
        self._sum: Any = None

    def add(self, ciphertext: bytes, weight: int) -> None:
        """Add ``weight`` times ``ciphertext``.

        Raises:
            RefusedError: ``ciphertext``: the bytes are not a ciphertext; the sum is unchanged.
        """
        term = self._format.read(ciphertext)
        try:
            if weight != 1:
                term = term * weight  # the same constant in all slots multiplies the noise only by the weight
            total = term if self._sum is None else self._sum + term
        except (RuntimeError, ValueError) as error:
            raise RefusedError(Reason.CIPHERTEXT, f"cannot be added ({error})") from None
        self._sum = total

    def add_plain(self, slots: NDArray[np.int64]) -> None:
        """Add ``slots``, int64[poly_modulus_degree], at most half the plain modulus in magnitude, to the sum."""
        if self._sum is None:
            raise ValueError("nothing was added that this could be added to")
        self._sum = self._sum + slots.tolist()

    def to_bytes(self) -> bytes:
        """Return the bytes of the sum, itself a ciphertext."""
        if self._sum is None:
            raise ValueError("nothing was added")
        return self._format.write(self._sum)


def load_context(data: bytes) -> ts.Context:
    """Load a TenSEAL context that works in the caller's thread.

    Raises:
        ConfigError: ``data`` is not a context.
    """
    try:
        return ts.context_from(data, n_threads=1)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"not a homomorphic encryption key ({error}); use a file written by key generation") from None


def check_parameters(context: ts.Context, parameters: Parameters) -> None:
    """Raise `ConfigError` unless ``context`` has exactly ``parameters``."""
    parms = context.seal_context().data.key_context_data().parms()
    sizes = tuple(int(prime.bit_count()) for prime in parms.coeff_modulus())
    found = (int(parms.poly_modulus_degree()), sizes, int(parms.plain_modulus().value()))
    expected = (parameters.poly_modulus_degree, parameters.coeff_mod_bit_sizes, parameters.plain_modulus)
    if found != expected:
        raise ConfigError(
            f"the key was made for (poly_modulus_degree, coeff_mod_bit_sizes, plain_modulus) = {found}, the delta"
            f" settings of this run need {expected}; generate a new pair for these settings"
        )
