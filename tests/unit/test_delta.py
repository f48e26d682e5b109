from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from fednats import wire
from fednats.codec.layout import Layout
from fednats.config import DeltaSettings
from fednats.crypto import secret
from fednats.delta import scheme
from fednats.delta.decode import Decoder, decoder
from fednats.delta.encode import Encoder, encoder
from fednats.delta.sum import Summer, summer
from fednats.errors import (
    ConfigError,
    LocalDataError,
    OverflowRefusedError,
    Reason,
    RefusedChunkError,
    RefusedError,
)
from fednats.messages import Chunk, Grid, ParameterSpec

MAX_PAYLOAD_BYTES = 2**20  # of nats-server


class Run:
    """A run's keys and roles, and a model that takes two chunks and leaves the last one partly empty."""

    def __init__(self, settings: DeltaSettings) -> None:
        self.settings = settings
        self.secret_key = self.public_key = None
        if settings.cipher == "bfv":
            self.secret_key, self.public_key = secret.generate(scheme.bfv(settings).parameters)
        n = scheme.values_per_chunk(settings) + 5000
        self.layout = Layout([ParameterSpec(name="weight", shape=(n - 100,)), ParameterSpec(name="bias", shape=(100,))])
        self.grid = Grid(grid_id="g", steps=(0.25, 2.0))
        self.encoder: Encoder = encoder(settings, self.public_key)
        self.summer: Summer = summer(settings, self.public_key)
        self.decoder: Decoder = decoder(settings, self.secret_key)

    @property
    def steps(self) -> NDArray[np.float32]:
        return self.layout.steps(self.grid.steps, 0, self.layout.n_parameters)

    def delta(self, seed: int) -> NDArray[np.float32]:
        """On the grid, so that rounding leaves nothing."""
        qmax = scheme.qmax(self.settings)
        values = np.random.default_rng(seed).integers(-qmax, qmax, self.layout.n_parameters, endpoint=True)
        return (values * self.steps).astype(np.float32)

    def encode(self, delta: NDArray[np.float32]) -> list[bytes]:
        nothing = np.zeros_like(delta)
        rng = np.random.default_rng(0)
        return [chunk.data for chunk in self.encoder.encode(delta, nothing, self.layout, self.grid, rng)]

    def sum(self, updates: Sequence[Sequence[bytes]], weights: Sequence[int], total_weight: int) -> list[bytes]:
        return [self.summer.weighted_sum(chunks, weights, total_weight) for chunks in zip(*updates, strict=True)]

    def mean(self, chunks: Sequence[bytes], total_weight: int) -> NDArray[np.float32]:
        return self.decoder.mean(chunks, total_weight, self.layout, self.grid)


@pytest.fixture(
    scope="module",
    params=[("bfv", 8), ("bfv", 4), ("none", 8), ("none", 4)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def run(request: pytest.FixtureRequest) -> Run:
    return Run(DeltaSettings(cipher=request.param[0], value_bits=request.param[1]))


@pytest.fixture(scope="module")
def bfv() -> Run:
    return Run(DeltaSettings())


def test_the_mean_of_a_weighted_sum_is_exact(run: Run) -> None:
    deltas = [run.delta(seed) for seed in range(3)]
    total = run.sum([run.encode(delta) for delta in deltas], [3, 1, 5], 9)
    expected = sum(weight * (delta / run.steps) for weight, delta in zip([3, 1, 5], deltas, strict=True))
    sizes = [run.decoder.values_per_chunk, 5000]
    sums = [run.decoder.decode_chunk(chunk, 9, n) for chunk, n in zip(total, sizes, strict=True)]
    np.testing.assert_array_equal(np.concatenate(sums), expected)
    np.testing.assert_allclose(run.mean(total, 9), np.average(deltas, axis=0, weights=[3, 1, 5]), rtol=1e-6)


def test_two_tiers_give_what_one_tier_gives(run: Run) -> None:
    deltas = [run.delta(seed) for seed in range(3)]
    updates = [run.encode(delta) for delta in deltas]
    region = run.sum(updates[:2], [2, 3], 5)
    total = run.sum([region, updates[2]], [4, 7], 27)
    np.testing.assert_allclose(run.mean(total, 27), np.average(deltas, axis=0, weights=[8, 12, 7]), rtol=1e-6)


def test_the_full_weight_on_the_largest_values_does_not_overflow(run: Run) -> None:
    delta = (scheme.qmax(run.settings) * run.steps).astype(np.float32)
    update = run.encode(delta)
    total = run.sum([update, update], [1, 499], 500)
    np.testing.assert_array_equal(run.mean(total, 500), delta)


def test_a_total_weight_beyond_the_fields_is_refused_before_anything_is_read(run: Run) -> None:
    with pytest.raises(OverflowRefusedError, match="501"):
        run.summer.weighted_sum([b"not even a chunk"], [1], 501)
    with pytest.raises(OverflowRefusedError, match="501"):
        run.decoder.decode_chunk(b"not even a chunk", 501)


def test_chunks_stay_below_the_payload_limit_and_cover_the_vector(run: Run) -> None:
    delta = run.delta(0)
    rng = np.random.default_rng(0)
    chunks = list(run.encoder.encode(delta, np.zeros_like(delta), run.layout, run.grid, rng))
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [
        (0, run.encoder.values_per_chunk),
        (run.encoder.values_per_chunk, run.layout.n_parameters),
    ]
    total = run.sum([[chunk.data for chunk in chunks]] * 2, [250, 250], 500)
    assert max(len(data) for data in [*total, *(chunk.data for chunk in chunks)]) < MAX_PAYLOAD_BYTES // 2


class Asked:
    """A vector that notes which parts of it were read."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self.values = values
        self.parts: list[slice] = []

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, part: slice) -> NDArray[np.float32]:
        self.parts.append(part)
        return self.values[part]


def test_the_residual_is_read_by_part_and_returned_by_part(run: Run) -> None:
    delta = run.delta(0)
    left = np.float32(0.1) * run.steps
    rng = np.random.default_rng(0)
    asked = Asked(left)
    chunks = list(run.encoder.encode(delta, asked, run.layout, run.grid, rng))
    assert asked.parts == [slice(chunk.start, chunk.stop) for chunk in chunks]
    decoded = run.mean([chunk.data for chunk in chunks], 1)
    again = np.concatenate([chunk.residual for chunk in chunks])
    np.testing.assert_allclose(decoded + again, delta + left, atol=1e-4)
    saturated = np.abs(delta) == scheme.qmax(run.settings) * run.steps
    assert 0 < sum(chunk.n_saturated for chunk in chunks) < saturated.sum()


def test_key_ids_agree_and_none_says_so(run: Run) -> None:
    assert run.encoder.key_id == run.summer.key_id == run.decoder.key_id
    assert (run.encoder.key_id == "none") == (run.settings.cipher == "none")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_delta_that_is_not_finite_is_refused(run: Run, bad: float) -> None:
    delta = run.delta(0)
    delta[-1] = bad
    with pytest.raises(LocalDataError, match="not finite"):
        list(run.encoder.encode(delta, np.zeros_like(delta), run.layout, run.grid, np.random.default_rng(0)))


def test_a_delta_of_the_wrong_length_or_grid_is_refused(run: Run) -> None:
    delta = run.delta(0)
    rng = np.random.default_rng(0)
    with pytest.raises(LocalDataError, match="a delta of"):
        run.encoder.encode(delta[:-1], delta, run.layout, run.grid, rng)
    with pytest.raises(RefusedError) as refused:
        run.encoder.encode(delta, delta, run.layout, Grid(grid_id="g", steps=(1.0,)), rng)
    assert refused.value.reason is Reason.WRONG_GRID


def test_a_bad_chunk_is_refused_by_its_index(run: Run) -> None:
    good = run.encode(run.delta(0))[0]
    parts = wire.unpack(good, Chunk).parts
    empty = wire.pack(Chunk(parts=()))
    cut = wire.pack(Chunk(parts=(*parts[:-1], parts[-1][:-1])))
    for bad in (b"", good[:-1], empty, cut):
        with pytest.raises(RefusedChunkError) as refused:
            run.summer.weighted_sum([good, good, bad], [1, 1, 1], 3, n_values=run.encoder.values_per_chunk)
        assert refused.value.index == 2


def test_with_the_number_of_values_known_a_wrong_first_chunk_blames_nobody_else(run: Run) -> None:
    first, last = run.encode(run.delta(0))
    n_last = run.layout.n_parameters - run.encoder.values_per_chunk
    with pytest.raises(RefusedChunkError) as refused:
        run.summer.weighted_sum([first, last], [1, 1], 2, n_values=n_last)
    assert refused.value.index == 0


def test_weights_that_do_not_fit_their_chunks_are_a_bug_of_the_caller(run: Run) -> None:
    chunk = run.encode(run.delta(0))[0]
    for weights, total in (([1], 2), ([1, 0], 2), ([1, 2], 2)):
        with pytest.raises(ValueError, match="one weight"):
            run.summer.weighted_sum([chunk, chunk], weights, total)


def test_sums_of_the_wrong_shape_are_refused(run: Run) -> None:
    chunks = run.encode(run.delta(0))
    for wrong in (chunks[:1], [*chunks, chunks[1]], chunks[::-1], []):
        with pytest.raises(RefusedError) as refused:
            run.mean(wrong, 1)
        assert refused.value.reason in {Reason.WRONG_SHAPE, Reason.MALFORMED}


def test_a_sum_announced_with_too_small_a_weight_is_refused(run: Run) -> None:
    update = run.encode(run.delta(0))
    total = run.sum([update, update], [200, 200], 400)
    with pytest.raises(RefusedError):
        run.mean(total, 3)


def test_what_was_encrypted_for_another_key_is_refused(bfv: Run) -> None:
    other = Run(bfv.settings)
    with pytest.raises(RefusedError, match="wrong key") as refused:
        bfv.mean(other.encode(other.delta(0)), 1)
    assert refused.value.reason is Reason.CIPHERTEXT


@pytest.mark.parametrize("total_weight", [1, 500])
def test_one_flipped_bit_of_a_ciphertext_is_noticed(bfv: Run, total_weight: int) -> None:
    update = bfv.encode(bfv.delta(0))
    chunk = bfv.summer.weighted_sum([update[0]], [total_weight], total_weight)
    parts = list(wire.unpack(chunk, Chunk).parts)
    broken = bytearray(parts[1])
    broken[len(broken) // 2 + 1234] ^= 0x40
    parts[1] = bytes(broken)
    with pytest.raises(RefusedError) as refused:
        bfv.decoder.decode_chunk(wire.pack(Chunk(parts=tuple(parts))), total_weight)
    assert refused.value.reason is Reason.CIPHERTEXT


def test_without_a_key_encryption_is_a_configuration_error() -> None:
    settings = DeltaSettings()
    for role in (encoder, summer, decoder):
        with pytest.raises(ConfigError, match="generate a pair"):
            role(settings, None)


@pytest.mark.parametrize("cipher", ["bfv", "none"])
def test_sums_beyond_32_bits_are_a_configuration_error(cipher: Literal["bfv", "none"]) -> None:
    settings = DeltaSettings(cipher=cipher, max_total_weight=20_000_000)
    with pytest.raises(ConfigError, match="16777215"):
        encoder(settings, None)


def test_unencrypted_values_beyond_the_possible_are_refused() -> None:
    run = Run(DeltaSettings(cipher="none"))
    one = wire.pack(Chunk(parts=(b"\x00", np.array([200], dtype="<i2").tobytes())))
    with pytest.raises(RefusedChunkError, match="weighted value of 200") as refused:
        run.summer.weighted_sum([one], [1], 1)
    assert refused.value.index == 0
    with pytest.raises(RefusedError, match="together"):
        run.summer.weighted_sum([one, one], [1, 1], 2)
    with pytest.raises(RefusedError, match="sum of 200"):
        run.decoder.decode_chunk(one, 1)


def test_sparse_updates_send_the_largest_and_keep_the_rest() -> None:
    run = Run(DeltaSettings(cipher="none", top_k=0.1))
    delta = np.random.default_rng(0).normal(size=run.layout.n_parameters).astype(np.float32)
    grid = Grid(grid_id="g", steps=(1 / 16, 1 / 16))
    nothing = np.zeros_like(delta)
    chunks = list(run.encoder.encode(delta, nothing, run.layout, grid, np.random.default_rng(0)))
    sent = run.decoder.mean([chunk.data for chunk in chunks], 1, run.layout, grid)
    assert np.count_nonzero(sent) == pytest.approx(0.1 * delta.size, rel=0.01)
    assert np.abs(delta[sent == 0]).max() < np.abs(delta[sent != 0]).min() + 0.2
    np.testing.assert_allclose(sent + np.concatenate([c.residual for c in chunks]), delta, atol=1e-6)
    dense = Run(DeltaSettings(cipher="none"))
    whole = dense.encoder.encode(delta, nothing, run.layout, grid, np.random.default_rng(0))
    assert sum(len(chunk.data) for chunk in chunks) < 0.25 * sum(len(chunk.data) for chunk in whole)


def test_the_shipped_settings_meet_the_size_targets() -> None:
    for value_bits, limit in ((8, 8.0), (4, 4.6)):
        bfv = scheme.bfv(DeltaSettings.model_validate({"value_bits": value_bits}))
        n_ciphertexts = -(-1_000_000 // bfv.packing.n_values)
        assert n_ciphertexts * bfv.parameters.ciphertext_bytes / 1e6 < limit
