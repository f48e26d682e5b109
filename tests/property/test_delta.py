import functools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fednats.codec.layout import Layout
from fednats.config import DeltaSettings
from fednats.crypto import secret
from fednats.crypto.ciphertext import pack_words, unpack_words
from fednats.crypto.public import PublicKey
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.encode import encoder
from fednats.delta.sum import summer
from fednats.errors import RefusedError
from fednats.messages import Grid, ParameterSpec

SCHEMES = st.sampled_from(
    [
        DeltaSettings.model_validate({"cipher": cipher, "value_bits": bits})
        for cipher in ("bfv", "none")
        for bits in (8, 4)
    ]
)
N = 500


@functools.cache
def key_pair(delta: DeltaSettings) -> tuple[bytes, bytes]:
    return secret.generate(scheme.bfv(delta).parameters)


@functools.cache
def roles(delta: DeltaSettings) -> tuple[bytes | None, bytes | None]:
    return key_pair(delta) if delta.cipher == "bfv" else (None, None)


def integers(delta: DeltaSettings, seed: int) -> NDArray[np.int64]:
    qmax = scheme.qmax(delta)
    return np.random.default_rng(seed).integers(-qmax, qmax, N, endpoint=True)


@settings(max_examples=25, deadline=None)
@given(
    delta=SCHEMES,
    seed=st.integers(0, 2**32),
    weights=st.lists(st.integers(1, 100), min_size=1, max_size=5),
    data=st.data(),
)
def test_any_weighted_sum_in_any_order_is_integer_arithmetic(
    delta: DeltaSettings, seed: int, weights: list[int], data: st.DataObject
) -> None:
    secret_key, public_key = roles(delta)
    layout = Layout([ParameterSpec(name="weight", shape=(N,))])
    grid = Grid(grid_id="g", steps=(1.0,))
    values = [integers(delta, seed + index) for index in range(len(weights))]
    encode = encoder(delta, public_key)
    chunks = [
        next(encode.encode(each.astype(np.float32), np.zeros(N, np.float32), layout, grid, np.random.default_rng(0)))
        for each in values
    ]
    order = data.draw(st.permutations(range(len(weights))))
    total = summer(delta, public_key).weighted_sum(
        [chunks[index].data for index in order], [weights[index] for index in order], sum(weights)
    )
    decoded = decoder(delta, secret_key).decode_chunk(total, sum(weights), N)
    expected = sum(weight * each for weight, each in zip(weights, values, strict=True))
    np.testing.assert_array_equal(decoded, expected)


@given(bits=st.integers(1, 64), seed=st.integers(0, 2**32), n=st.integers(1, 20))
def test_words_round_trip_in_exactly_their_bits(bits: int, seed: int, n: int) -> None:
    words = np.random.default_rng(seed).integers(0, 2**bits - 1, 8 * n, dtype=np.uint64, endpoint=True)
    packed = pack_words(words, bits)
    assert len(packed) == n * bits
    np.testing.assert_array_equal(unpack_words(packed, bits), words)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), n_flips=st.integers(1, 4))
def test_flipped_bits_are_a_ciphertext_or_refused_and_never_crash(seed: int, n_flips: int) -> None:
    delta = DeltaSettings()
    key = PublicKey(key_pair(delta)[1], scheme.bfv(delta).parameters)
    damaged = np.frombuffer(key.encrypt(np.zeros(4096, dtype=np.int64)), dtype=np.uint8).copy()
    rng = np.random.default_rng(seed)
    damaged[rng.integers(0, damaged.size, n_flips)] ^= np.uint8(1 << rng.integers(0, 8))
    total = key.weighted_sum()
    try:
        total.add(damaged.tobytes(), 3)
    except RefusedError:
        return
    assert len(total.to_bytes()) == damaged.size
