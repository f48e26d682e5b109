"""The secret key, which only the coordinator holds. No module of a site or an aggregator may import this one."""

import numpy as np
import tenseal as ts
from numpy.typing import NDArray

from fednats.crypto.ciphertext import CiphertextFormat
from fednats.crypto.parameters import Parameters
from fednats.crypto.public import KEY_ID_BYTES, check_parameters, key_id, load_context
from fednats.errors import ConfigError

_SAVED = {"save_public_key": True, "save_galois_keys": False, "save_relin_keys": False}


def generate(parameters: Parameters) -> tuple[bytes, bytes]:
    """Make a key pair: (secret key, public key). The secret key starts with the id of its public key."""
    context = ts.context(
        ts.SCHEME_TYPE.BFV,
        parameters.poly_modulus_degree,
        parameters.plain_modulus,
        coeff_mod_bit_sizes=list(parameters.coeff_mod_bit_sizes),
        n_threads=1,
    )
    public_key = context.serialize(**_SAVED, save_secret_key=False)
    secret_key = bytes.fromhex(key_id(public_key)) + context.serialize(**_SAVED, save_secret_key=True)
    return secret_key, public_key


def public_half(secret_key: bytes) -> bytes:
    """Return the public key that was made with ``secret_key``. Raises ConfigError: not a secret key, or damaged."""
    public_key: bytes = load_context(secret_key[KEY_ID_BYTES:]).serialize(**_SAVED, save_secret_key=False)
    if bytes.fromhex(key_id(public_key)) != secret_key[:KEY_ID_BYTES]:
        raise ConfigError("the secret key does not begin with the id of its public half; restore it from a copy")
    return public_key


class SecretKey:
    """Decrypts sums.

    Raises:
        ConfigError: not a secret key, or one for other parameters.
    """

    def __init__(self, secret_key: bytes, parameters: Parameters) -> None:
        context = load_context(secret_key[KEY_ID_BYTES:])
        if not (context.has_secret_key() and context.has_public_key()):
            raise ConfigError("the secret key file holds no secret key, or no public; use the one of key generation")
        check_parameters(context, parameters)
        self.key_id = secret_key[:KEY_ID_BYTES].hex()
        self._format = CiphertextFormat(context)

    def decrypt(self, ciphertext: bytes) -> NDArray[np.int64]:
        """Decrypt a ciphertext into slots, int64[poly_modulus_degree] in [0, plain_modulus).

        Decryption always gives some result. Only the ranges of the fields, which `fednats.codec.packing` checks, show
        whether it is a sum that was encrypted for this key.

        Raises:
            RefusedError: ``ciphertext``: the bytes are not a ciphertext.
        """
        slots = np.array(self._format.read(ciphertext).decrypt(), dtype=np.int64)
        slots[slots < 0] += self._format.plain_modulus
        return slots
