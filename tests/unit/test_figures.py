"""Means of hospitals' figures out of encrypted sums, whichever hospitals have which."""

import math

import numpy as np
import pytest

from fednats.config import DeltaSettings
from fednats.crypto import secret
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.encode import encoder
from fednats.delta.sum import summer
from fednats.errors import LocalDataError, Reason, RefusedError
from fednats.learning.evaluation import LocalEvaluation
from fednats.learning.figures import N_CELLS, arrangement_of, cells, known_names, n_integers, read_figures
from fednats.learning.scores import Counts, n_counts
from fednats.messages import MAX_FIGURES, MAX_METRIC

FEW_BITS = DeltaSettings(value_bits=4, max_total_weight=100_000)
"""So many sites that a count has hardly any bits."""


def hospital(
    n_samples: int, figures: tuple[str, ...] | None = None, counts: Counts | None = None, **metrics: float
) -> LocalEvaluation:
    return LocalEvaluation(metrics, n_samples, counts, tuple(metrics) if figures is None else figures)


@pytest.mark.parametrize(
    "settings", [DeltaSettings(), DeltaSettings(cipher="none"), FEW_BITS], ids=["bfv", "none", "few"]
)
def test_the_coordinator_gets_means_weighted_by_cases(settings: DeltaSettings) -> None:
    hospitals = [
        hospital(30, c_index=0.71, volume=-12.5e6),
        hospital(20_001, c_index=0.64, volume=3.25),
        hospital(3, figures=("volume", "c_index"), volume=1e-9),  # its cases do not allow a c-index
        hospital(50, p_value=0.125),
    ]
    key, public = secret.generate(scheme.bfv(settings).parameters) if settings.cipher == "bfv" else (None, None)
    encode, add, decode = encoder(settings, public), summer(settings, public), decoder(settings, key)
    bits = scheme.count_bits(settings)
    n = n_integers(0, 0, bits)
    sent = [encode.encode_counts(each.flat(bits)) for each in hospitals]
    region = add.sum_counts(sent[:2], (1, 1), n)
    summed = decode.decode_counts(add.sum_counts([region, *sent[2:]], (2, 1, 1), n), 4, n)
    names = known_names([each.figures or () for each in hospitals], 0)
    n_cases, found = read_figures(summed, names, 0, bits, 4)
    assert names == ("c_index", "volume", "p_value")
    assert n_cases == 20_084
    assert found["c_index"].value == pytest.approx((30 * 0.71 + 20_001 * 0.64) / 20_031, abs=1e-9)
    assert found["volume"].value == pytest.approx((-30 * 12.5e6 + 20_001 * 3.25 + 3e-9) / 20_034, rel=1e-9)
    assert found["p_value"].value == 0.125
    assert {name: share.n_sites for name, share in found.items()} == {"c_index": 2, "volume": 3, "p_value": 1}


def test_counts_and_figures_go_together_in_one_ciphertext() -> None:
    counts = Counts.of(np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 2)
    bits = scheme.count_bits(DeltaSettings())
    flat = hospital(40, counts=counts, spread=2.0).flat(bits)
    assert len(flat) == n_integers(2, 0, bits) <= scheme.bfv(DeltaSettings()).counts.n_values
    np.testing.assert_array_equal(flat[: n_counts(2)], counts.flat())
    assert read_figures(flat[n_counts(2) :], ["spread"], 0, bits, 1)[1]["spread"].value == 2.0
    assert len(LocalEvaluation({"auc": 0.5}, 40, counts, None).flat(bits)) == n_counts(2)


def test_names_that_share_a_cell_are_kept_apart_by_another_arrangement() -> None:
    names = tuple(f"dice_{index}" for index in range(MAX_FIGURES))
    arrangement = arrangement_of(names)
    assert arrangement > 0
    assert len(cells(names, arrangement)) == MAX_FIGURES
    with pytest.raises(LocalDataError, match=f"{MAX_FIGURES + 1} figures, at most {MAX_FIGURES}"):
        arrangement_of((*names, "one more"))


def test_nobody_pushes_the_figures_of_others_out() -> None:
    """Who names many others, or one that falls into the same cell, is not heard over those who agree."""
    auc = next(iter(cells(["c_index"], 0)))
    rival = next(name for name in map(str, range(100 * N_CELLS)) if auc in cells([name], 0))
    flood = tuple(map(str, range(MAX_FIGURES)))
    known = known_names([(rival, *flood[1:]), ("c_index", "loss"), ("c_index", "loss")], 0)
    assert {"c_index", "loss"} <= set(known)
    assert rival not in known
    assert len(known) <= MAX_FIGURES


def test_a_figure_that_contradicts_itself_is_left_out_and_the_others_stay() -> None:
    bits = 15
    flat = hospital(10, spread=2.0, gap=3.0).flat(bits)
    (cell,) = cells(["spread"], 0)
    width = len(flat) // (N_CELLS + 1)
    flat[(cell + 1) * width + width - 2] = 1  # far more cases than there are
    assert read_figures(flat, ["spread", "gap"], 0, bits, 1)[1].keys() == {"gap"}
    flat[width - 2] = -1
    with pytest.raises(RefusedError) as raised:
        read_figures(flat, ["gap"], 0, bits, 1)
    assert raised.value.reason is Reason.MALFORMED


@pytest.mark.parametrize("value", [math.inf, math.nan, 2 * MAX_METRIC])
def test_what_is_no_number_is_never_summed(value: float) -> None:
    with pytest.raises(LocalDataError, match="metric spread is"):
        hospital(10, spread=value).flat(15)
    assert (
        abs(read_figures(hospital(2**40, spread=-MAX_METRIC).flat(15), ["spread"], 0, 15, 1)[1]["spread"].value)
        == MAX_METRIC
    )
