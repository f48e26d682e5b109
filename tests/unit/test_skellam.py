import numpy as np
import pytest
from numpy.typing import NDArray

from fednats.codec import grid as grids
from fednats.codec.layout import Layout
from fednats.config import DeltaSettings, SitePrivacySettings, parse
from fednats.crypto import secret
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.encode import encoder
from fednats.delta.sum import summer
from fednats.errors import ConfigError, LocalDataError
from fednats.messages import Grid, ParameterSpec
from fednats.privacy.randomness import Randomness
from fednats.privacy.skellam import SkellamRounding, smallest_variance

LAYOUT = Layout((ParameterSpec(name="weight", shape=(60, 50)), ParameterSpec(name="bias", shape=(50,))))
N = LAYOUT.n_parameters
GRID = Grid(grid_id="g", steps=(2.0**-10, 2.0**-7))
STEPS = LAYOUT.steps(GRID.steps, 0, N)
NOTHING = np.zeros(N, np.float32)

SILENT = Randomness(lambda n: (b"\0" * 7 + b"\x80") * (n // 8))
"""Every value drawn is the median: noise of 0."""


def vector(norm: float, seed: int = 0) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).normal(size=N)
    return (values * (norm / np.linalg.norm(values))).astype(np.float32)


def rounded(
    delta: NDArray[np.float32],
    residual: NDArray[np.float32] = NOTHING,
    *,
    clip_norm: float = 1.0,
    noise_multiplier: float = 1.0,
    randomness: Randomness | None = None,
) -> tuple[NDArray[np.float64], NDArray[np.float32], int]:
    """What is sent in units of the model, what is kept, and how many values did not fit the grid."""
    settings = SitePrivacySettings(clip_norm=clip_norm, noise_multiplier=noise_multiplier)
    made = SkellamRounding(settings, delta, residual, randomness)(delta + residual, STEPS, 127)
    return made.values * STEPS.astype(float), made.residual, made.n_saturated


@pytest.mark.parametrize("norm", [0.01, 0.999999, 1.0, 1.000001, 3.0, 1e6])
@pytest.mark.parametrize("seed", range(5))
def test_whatever_a_site_learned_is_no_longer_than_the_clipping_norm(norm: float, seed: int) -> None:
    sent, _, n_saturated = rounded(vector(norm, seed), vector(norm / 3, seed + 100), randomness=SILENT)
    assert n_saturated == 0
    assert np.linalg.norm(sent) <= 1.0  # exactly: rounding included


def test_what_rounding_cut_off_is_kept_and_what_clipping_took_is_not() -> None:
    delta = vector(4.0)
    sent, kept, _ = rounded(delta, randomness=SILENT)
    assert (np.abs(kept) < STEPS).all()
    np.testing.assert_allclose(sent + kept, delta / 4, atol=1e-6)


def test_noise_is_not_taken_back_by_the_next_update() -> None:
    delta = vector(0.5)
    _, kept, _ = rounded(delta)
    _, silent, _ = rounded(delta, randomness=SILENT)
    np.testing.assert_array_equal(kept, silent)


def test_error_feedback_delivers_what_rounding_towards_zero_cuts_off() -> None:
    delta, kept, total = vector(0.02), NOTHING, np.zeros(N)
    for _ in range(40):
        sent, kept, _ = rounded(delta, kept, randomness=SILENT)
        total += sent
    np.testing.assert_allclose(total + kept, 40 * delta.astype(float), atol=1e-4)


def test_every_value_gets_the_noise_that_is_accounted() -> None:
    """The same in units of the model on every tensor; whether the delta is long, short or nothing."""
    for delta in (NOTHING, vector(1.0), vector(100.0)):
        noise = (
            rounded(delta, clip_norm=0.1, noise_multiplier=0.1)[0] - rounded(delta, clip_norm=0.1, randomness=SILENT)[0]
        )
        for part in LAYOUT.slices:
            assert noise[part].std() == pytest.approx(0.01, rel=0.7 if part.stop == N else 0.1)
        assert abs(noise.mean()) < 0.001


def test_noise_beyond_the_grid_is_clipped_and_counted() -> None:
    _, _, n_saturated = rounded(NOTHING, noise_multiplier=1.0, clip_norm=0.5)  # 512 and 64 steps wide
    assert 0.7 * N < n_saturated < 0.9 * N
    with pytest.raises(LocalDataError, match="lower clip_norm"):
        rounded(NOTHING, clip_norm=1e6)


def test_the_largest_step_has_the_smallest_variance() -> None:
    settings = SitePrivacySettings(clip_norm=0.5, noise_multiplier=0.25)
    assert smallest_variance(settings, LAYOUT, GRID) == (0.125 * 2**7) ** 2
    with_nothing = Layout((*LAYOUT.parameters, ParameterSpec(name="none", shape=(0,))))
    wider = Grid(grid_id="w", steps=(*GRID.steps, 100.0))
    assert smallest_variance(settings, with_nothing, wider) == (0.125 * 2**7) ** 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_delta_that_is_not_finite_is_refused(bad: float) -> None:
    delta = vector(1.0)
    delta[7] = bad
    with pytest.raises(LocalDataError, match="not finite"):
        rounded(delta)


def test_the_first_grid_holds_the_noise() -> None:
    grid = grids.initial(LAYOUT, vector(1.0), 127, noise=0.25)
    delta = np.zeros(N, np.float32)
    made = SkellamRounding(SitePrivacySettings(noise_multiplier=0.25), delta, delta)
    noisy = made(delta, LAYOUT.steps(grid.steps, 0, N), 127)
    assert noisy.n_saturated < 1e-3 * N


@pytest.mark.parametrize("value_bits", [8, 4])
def test_the_decrypted_sum_carries_each_site_s_noise_times_its_weight(value_bits: int) -> None:
    """Three sites, one of which adds noise: what is decrypted has all of that site's noise, at its weight."""
    settings = DeltaSettings.model_validate(
        {"value_bits": value_bits, "dp": {"clip_norm": 1.0, "noise_multiplier": 0.05}}
    )
    secret_key, public_key = secret.generate(scheme.bfv(settings).parameters)
    qmax = scheme.qmax(settings)
    assert settings.dp is not None
    grid = grids.initial(LAYOUT, NOTHING, qmax, settings.dp.deviation)
    encode = encoder(settings, public_key)
    rng = np.random.default_rng(0)
    deltas = [vector(0.5, seed) for seed in range(3)]
    updates = []
    for site, delta in enumerate(deltas):
        rounding = SkellamRounding(settings.dp, delta, NOTHING) if site == 0 else None
        (chunk,) = encode.encode(delta, NOTHING, LAYOUT, grid, rng, rounding)
        updates.append(chunk.data)
    weights = [5, 2, 1]
    total = summer(settings, public_key).weighted_sum(updates, weights, 8)
    mean = decoder(settings, secret_key).mean([total], 8, LAYOUT, grid)
    error = mean - np.average(deltas, axis=0, weights=weights)
    rounding_error = max(grid.steps)
    assert error.std() == pytest.approx(5 / 8 * 0.05, rel=0.1 if value_bits == 8 else 0.3)
    assert error.std() > 5 / 8 * 0.05 * 0.9
    assert rounding_error < 0.05


def test_noise_does_not_follow_from_the_generator_of_the_run() -> None:
    encode = encoder(DeltaSettings(cipher="none"), None)
    updates = []
    for _ in range(2):
        rounding = SkellamRounding(SitePrivacySettings(noise_multiplier=0.01), NOTHING, NOTHING)
        (chunk,) = encode.encode(NOTHING, NOTHING, LAYOUT, GRID, np.random.default_rng(0), rounding)
        updates.append(chunk.values)
    assert not np.array_equal(updates[0], updates[1])


def test_sparse_deltas_would_tell_which_values_are_large() -> None:
    with pytest.raises(ConfigError, match="top_k"):
        parse({"cipher": "none", "top_k": 0.1, "dp": {}}, DeltaSettings, source="delta")
