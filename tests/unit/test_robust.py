"""Robust sums: whole numbers, valid for the tier above, and refused where they would not be what they say."""

import numpy as np
import pytest
from numpy.typing import NDArray

from fednats import wire
from fednats.codec import sparse
from fednats.config import AggregationSettings, DeltaSettings, RunSettings, parse
from fednats.crypto import secret
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.robust import bound_norms
from fednats.delta.sum import summer
from fednats.errors import ConfigError, OverflowRefusedError, Reason, RefusedChunkError, RefusedError
from fednats.messages import Chunk, ModelManifest
from tests import hostile

PLAIN = DeltaSettings(cipher="none")
RULES = ("median", "trimmed_mean", "norm_bound")


def chunk(values: NDArray[np.int32]) -> bytes:
    return wire.pack(Chunk(parts=sparse.encode(values)))


def settings(rule: str, **more: object) -> AggregationSettings:
    return AggregationSettings.model_validate({"robust": rule, "goal": 5, **more})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_updates", [1, 2, 4, 5])
def test_the_sum_is_one_that_the_tier_above_takes(rule: str, n_updates: int) -> None:
    rng = np.random.default_rng(n_updates)
    values = rng.integers(-127, 127, (n_updates, 400), endpoint=True).astype(np.int32)
    weights = [100, 250, 1, 99, 50][:n_updates]
    factors = bound_norms([float(np.linalg.norm(row)) for row in values])
    add = summer(PLAIN, None)
    summed = add.robust_sum([chunk(row) for row in values], weights, 400, settings(rule), factors)
    decoded = decoder(PLAIN, None).decode_chunk(summed, sum(weights), 400)
    exact = {
        "median": np.median(values, axis=0) * sum(weights),
        "trimmed_mean": np.sort(values, axis=0)[n_updates // 5 : n_updates - n_updates // 5].mean(axis=0)
        * sum(weights),
        "norm_bound": (values * (np.array(weights) * factors)[:, None]).sum(axis=0),
    }[rule]
    assert np.abs(decoded - exact).max() <= 0.5 + 1e-9
    above = add.weighted_sum([summed], [1], sum(weights), 400, [sum(weights)])
    np.testing.assert_array_equal(decoder(PLAIN, None).decode_chunk(above, sum(weights), 400), decoded)


def test_squares_are_those_of_the_integers() -> None:
    values = np.arange(-5, 5, dtype=np.int32)
    assert summer(PLAIN, None).squares([chunk(values), chunk(0 * values)], 10) == (85.0, 0.0)


@pytest.mark.parametrize("rule", RULES)
def test_a_bad_update_is_refused_by_its_number(rule: str) -> None:
    good = chunk(np.ones(10, np.int32))
    for bad in (chunk(np.full(10, 128, np.int32)), b"garbage", chunk(np.ones(11, np.int32))):
        with pytest.raises(RefusedChunkError) as refused:
            summer(PLAIN, None).robust_sum([good, bad], [1, 1], 10, settings(rule), (1.0, 1.0))
        assert refused.value.index == 1


def test_a_weight_beyond_the_total_is_refused() -> None:
    with pytest.raises(OverflowRefusedError):
        summer(PLAIN, None).robust_sum([chunk(np.ones(3, np.int32))], [501], 3, settings("median"))


def test_encrypted_updates_cannot_be_compared() -> None:
    bfv = DeltaSettings()
    _, public_key = secret.generate(scheme.bfv(bfv).parameters)
    with pytest.raises(ValueError, match="cannot be compared"):
        summer(bfv, public_key).robust_sum([b""], [1], 3, settings("median"))


@pytest.mark.parametrize(
    ("aggregation", "delta", "says"),
    [
        ({"robust": "median", "goal": 5}, {}, "needs delta.cipher"),
        ({"robust": "norm_bound", "goal": 5}, {}, "needs delta.cipher"),
        ({"robust": "median", "goal": 5}, {"cipher": "none", "top_k": 0.1}, "needs delta.top_k = 1"),
        ({"robust": "trimmed_mean", "goal": 2}, {"cipher": "none"}, "goal of 3 or more"),
        ({"robust": "krum", "goal": 5}, {"cipher": "none"}, "median"),
        ({"trim": 0.5}, {"cipher": "none"}, "less than 0.5"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_the_remedy(
    aggregation: dict[str, object], delta: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        parse({"name": "r", "aggregation": aggregation, "delta": delta}, RunSettings, source="x")


def test_settings_that_can_be_pass() -> None:
    for aggregation, delta in (
        ({"robust": "median", "goal": "all"}, {"cipher": "none"}),
        ({"robust": "norm_bound", "goal": 3}, {"cipher": "none", "top_k": 0.1}),
        ({"robust": "none"}, {}),
    ):
        parse({"name": "r", "aggregation": aggregation, "delta": delta}, RunSettings, source="x")


def test_a_manifest_that_asks_for_what_cannot_be_is_refused() -> None:
    manifest = hostile.MANIFEST.model_copy(update={"aggregation": settings("median")})
    with pytest.raises(RefusedError, match="nobody can compare") as refused:
        wire.unpack(wire.pack(manifest), ModelManifest)
    assert refused.value.reason is Reason.MALFORMED
