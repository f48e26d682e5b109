"""What a sum tells of the updates in it: a digit below the last of their mean, it does not."""

from functools import partial

import numpy as np
import pytest
from numpy.typing import NDArray

from fednats.codec.layout import Layout
from fednats.config import DeltaSettings
from fednats.crypto import keystream, secret
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.encode import EncodedChunk, encoder
from fednats.delta.sum import summer
from fednats.messages import Grid, ParameterSpec
from fednats.protocol.events import Combination, Part
from fednats.protocol.sums import MAX_SHARE, weigh
from tests.makers import aggregate, update

QMAX, TOTAL = 127, 500


def combination(*parts: Part) -> Combination:
    return Combination("c", 0, parts, scale=1.0, n_sites=len(parts))


def weights_of(*n_samples: int) -> tuple[int, ...]:
    """Return the weights that a region gives updates of sites with so many samples."""
    return weigh(combination(*(Part(update(f"site-{n}"), float(n), 0) for n in n_samples)), TOTAL)


def preimages(total: int, weights: tuple[int, ...], slack: int) -> int:
    """Count the pairs of values of two updates from which a sum may come whose dither is at most ``slack``."""
    first, second = weights
    a = np.arange(-QMAX, QMAX + 1)
    sums = first * a[:, np.newaxis] + second * a
    return int(np.count_nonzero(np.abs(sums - total) <= slack))


@pytest.mark.parametrize("n_samples", [(165, 19), (303, 294), (100, 57), (90, 10)])
def test_a_sum_of_two_has_many_explanations_and_not_one(n_samples: tuple[int, int]) -> None:
    weights = weights_of(*n_samples)
    rng = np.random.default_rng(0)
    for a, b in rng.integers(-40, 41, (200, 2)):
        exact = weights[0] * int(a) + weights[1] * int(b)
        largest = sum(weights) // 2
        told = exact + int(rng.integers(-largest, largest + 1))
        assert preimages(exact, weights, 0) < 30, "without dither there are few, often one"
        assert preimages(told, weights, largest) > 150


class Sums:
    """Updates of a small model, encrypted, and the sums of them."""

    def __init__(self) -> None:
        self.settings = DeltaSettings()
        self.secret_key, self.public_key = secret.generate(scheme.bfv(self.settings).parameters)
        self.n = 20_000
        self.layout = Layout([ParameterSpec(name="weight", shape=(self.n,))])
        self.grid = Grid(grid_id="g", steps=(1.0,))
        self.add = summer(self.settings, self.public_key)

    def update(self, values: NDArray[np.float32]) -> EncodedChunk:
        encode = encoder(self.settings, self.public_key)
        nothing = np.zeros(self.n, np.float32)
        (chunk,) = encode.encode(values, nothing, self.layout, self.grid, np.random.default_rng(0))
        return chunk

    def sum(self, chunks: list[bytes], weights: list[int], carried: list[int], name: str) -> bytes:
        total = sum(weight * size for weight, size in zip(weights, carried, strict=True))
        return self.add.weighted_sum(
            chunks, weights, total, self.n, carried, partial(keystream.uniform, b"secret", name)
        )

    def read(self, chunk: bytes, total: int) -> NDArray[np.int32]:
        return decoder(self.settings, self.secret_key).decode_chunk(chunk, total, self.n)


@pytest.fixture(scope="module")
def sums() -> Sums:
    return Sums()


def random_values(seed: int, n: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).integers(-QMAX, QMAX, n, endpoint=True).astype(np.float32)


def test_dither_is_half_a_step_of_the_mean_at_most_and_right_on_average(sums: Sums) -> None:
    a, b = (sums.update(random_values(seed, sums.n)) for seed in (1, 2))
    off = sums.read(sums.sum([a.data, b.data], [427, 44], [1, 1], "one"), 471)
    off -= 427 * a.values.astype(np.int32) + 44 * b.values.astype(np.int32)
    assert np.abs(off).max() == 471 // 2
    assert np.abs(off).mean() == pytest.approx(471 / 4, rel=0.03)  # uniform
    assert abs(off.mean()) < 5 * 471 / np.sqrt(12 * sums.n)


def test_a_sum_that_is_made_again_is_the_same_and_another_is_dithered_by_itself(sums: Sums) -> None:
    chunks = [sums.update(random_values(seed, sums.n)).data for seed in (1, 2)]
    assert sums.sum(chunks, [3, 2], [1, 1], "one") == sums.sum(chunks, [3, 2], [1, 1], "one")
    one, other = (sums.read(sums.sum(chunks, [300, 200], [1, 1], name), 500) for name in ("one", "other"))
    assert np.corrcoef(one - other, random_values(3, sums.n))[0, 1] == pytest.approx(0, abs=0.05)
    assert np.abs(one - other).max() > 450  # two of them, half a step each, in opposite directions


@pytest.mark.parametrize("end", [-QMAX, QMAX])
def test_over_two_tiers_the_largest_values_with_the_whole_weight_stay_in_their_fields(sums: Sums, end: int) -> None:
    extreme = sums.update(np.full(sums.n, end, np.float32))
    lower = [sums.sum([extreme.data] * 2, [12, 13], [1, 1], name) for name in ("north", "south")]
    upper = sums.sum([*lower, extreme.data], [9, 10, 25], [25, 25, 1], "upper")
    off = sums.read(upper, TOTAL) - TOTAL * extreme.values.astype(np.int32)
    assert (extreme.values == end).mean() > 0.999
    assert 0 < np.abs(off).max() <= TOTAL // 2


def test_no_site_has_more_than_its_share_whatever_the_run_would_give_it() -> None:
    for n_samples in ((10_000, 1), (10_000, 1, 1), (1, 5_000, 300)):
        weights = weights_of(*n_samples)
        assert max(weights) / sum(weights) <= MAX_SHARE + 1 / sum(weights)
    assert weights_of(300, 200) == (300, 200)
    often = [Part(update("a", number), 900.0, 0) for number in (1, 2, 3)]
    weights = weigh(combination(*often, Part(update("b"), 50.0, 0)), TOTAL)
    assert sum(weights[:3]) / sum(weights) == pytest.approx(MAX_SHARE, abs=0.01)


def test_a_sum_of_enough_sites_may_have_any_share() -> None:
    parts = [Part(aggregate("north", mass=9_900.0), 9_900.0, 0), Part(update("a"), 100.0, 0)]
    north, a = weigh(combination(*parts), TOTAL)
    assert 10 * north / (10 * north + a) == pytest.approx(0.99, abs=0.005)
