"""What the coordinator reads out of regions' sums: a lie in one of them costs its region's figures, and no other's."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from fednats.config import DeltaSettings
from fednats.crypto import secret
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.encode import encoder
from fednats.delta.sum import summer
from fednats.errors import Reason, RefusedChunkError
from fednats.learning.figures import flat_figures
from fednats.learning.scores import Counts, n_counts
from fednats.messages import EvaluationSum
from fednats.services.coordinator.pooling import pool
from fednats.services.daemon.answers import PooledEvaluation
from tests.makers import evaluation_sum

BFV = DeltaSettings()
SECRET, PUBLIC = secret.generate(scheme.bfv(BFV).parameters)
BITS = scheme.count_bits(BFV)
N_CASES = 30
N_COUNTS = n_counts(2)

Flat = NDArray[np.int64]


def evaluated(seed: int, spread: float = 0.5) -> Flat:
    """Return the counts of one hospital, and one figure."""
    rng = np.random.default_rng(seed)
    counts = Counts.of(rng.normal(size=(N_CASES, 2)), rng.integers(0, 2, N_CASES))
    return np.concatenate([counts.flat(), flat_figures({"spread": spread}, N_CASES, 0, BITS)])


def region(name: str, *hospitals: Flat) -> tuple[tuple[bytes, ...], EvaluationSum]:
    """Return the sum of what hospitals sent, each of which registered `N_CASES`, and its head."""
    sent = [encoder(BFV, PUBLIC).encode_counts(own) for own in hospitals]
    chunks = summer(BFV, PUBLIC).sum_counts(sent, [1] * len(sent), len(hospitals[0]))
    changes = {"arrangement": 0, "figures": ("spread",), "n_samples": N_CASES * len(sent)}
    return chunks, evaluation_sum(name, n_sites=len(sent)).model_copy(update=changes)


def pooled(*regions: tuple[tuple[bytes, ...], EvaluationSum]) -> PooledEvaluation:
    chunks, heads = zip(*regions, strict=True)
    return pool(decoder(BFV, SECRET).decode_counts, BFV, chunks, heads, 2)


HONEST = region("south", evaluated(2), evaluated(3))


def test_the_figures_of_all_regions_are_pooled() -> None:
    found = pooled(region("north", evaluated(0, 0.2), evaluated(1, 0.4)), HONEST)
    assert found.n_samples == 4 * N_CASES
    assert found.means == pytest.approx({"spread": 0.4})
    assert found.metrics.keys() >= {"auc", "accuracy"}


def many_cases(own: Flat) -> Flat:
    """All of them scored without a fault."""
    scores = np.repeat([[5.0, -5.0], [-5.0, 5.0]], 300, axis=0)
    counts = Counts.of(scores, np.repeat([0, 1], 300))
    return np.concatenate([counts.flat(), own[N_COUNTS:]])


def negative(own: Flat) -> Flat:
    changed = own.copy()
    changed[0] = -40
    return changed


def many_weights(own: Flat) -> Flat:
    """The figure counts as that of a thousand cases."""
    return np.concatenate([own[:N_COUNTS], flat_figures({"spread": 1000.0}, 1000, 0, BITS)])


@pytest.mark.parametrize(
    ("lie", "reason"),
    [(many_cases, Reason.TEST_CASES), (negative, Reason.MALFORMED), (many_weights, Reason.TEST_CASES)],
)
def test_a_lie_about_the_cases_costs_only_the_figures_of_its_region(
    lie: Callable[[Flat], Flat], reason: Reason
) -> None:
    liars = region("north", evaluated(0), lie(evaluated(1)))
    with pytest.raises(RefusedChunkError) as refused:
        pooled(liars, HONEST)
    assert (refused.value.index, refused.value.reason) == (0, reason)
    with pytest.raises(RefusedChunkError) as refused:
        pooled(HONEST, liars)
    assert refused.value.index == 1
    assert pooled(HONEST).n_samples == 2 * N_CASES
