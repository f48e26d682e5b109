import contextlib
import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from fednats.codec import sparse
from fednats.codec.layout import Layout
from fednats.codec.packing import Packing
from fednats.codec.quantiser import quantise
from fednats.errors import RefusedError
from fednats.messages import Grid, ParameterSpec

QMAX = st.sampled_from([127, 7])
FLOATS = st.floats(-1e6, 1e6, width=32)


def integers(qmax: int, n: int) -> st.SearchStrategy[NDArray[np.int8]]:
    return arrays.arrays(np.int8, n, elements=st.integers(-qmax, qmax))


@given(data=st.data(), qmax=QMAX, n_fields=st.integers(1, 3), n_slots=st.integers(1, 5))
def test_packed_weighted_sums_are_integer_arithmetic_in_any_order(
    data: st.DataObject, qmax: int, n_fields: int, n_slots: int
) -> None:
    weights = data.draw(st.lists(st.integers(1, 200), min_size=1, max_size=6))
    total = sum(weights)
    packing = Packing(qmax, data.draw(st.integers(total, 2000)), n_fields, n_slots)
    values = [data.draw(integers(qmax, packing.n_values)) for _ in weights]
    order = data.draw(st.permutations(range(len(weights))))
    slots = np.zeros(n_slots, dtype=np.int64)
    for index in order:
        slots += weights[index] * packing.pack(values[index])
    expected = sum(weight * each.astype(np.int32) for weight, each in zip(weights, values, strict=True))
    np.testing.assert_array_equal(packing.unpack(slots, total), expected)


@given(
    values=arrays.arrays(np.float32, st.integers(0, 50), elements=FLOATS),
    step=st.sampled_from([2.0**-10, 0.01, 1.0, 300.0]),
    qmax=QMAX,
    seed=st.integers(0, 2**32),
)
def test_quantised_and_residual_are_the_input(values: NDArray[np.float32], step: float, qmax: int, seed: int) -> None:
    steps = np.full(values.size, step, dtype=np.float32)
    quantised = quantise(values, steps, qmax, np.random.default_rng(seed))
    assert (np.abs(quantised.values.astype(int)) <= qmax).all()
    np.testing.assert_allclose(
        quantised.values * steps.astype(np.float64) + quantised.residual, values, rtol=1e-6, atol=1e-6 * step * qmax
    )
    inside = np.abs(values) < step * (qmax - 1)
    assert (np.abs(quantised.residual[inside]) <= step * (1 + 1e-4)).all()
    assert quantised.n_saturated <= np.count_nonzero(np.abs(values) > step * qmax * (1 - 1e-6))


@given(
    values=arrays.arrays(
        np.int32, st.integers(0, 1500), elements=st.integers(-(2**31) + 1, 2**31 - 1), fill=st.just(np.int32(0))
    )
)
def test_sparse_segments_round_trip(values: NDArray[np.int32]) -> None:
    np.testing.assert_array_equal(sparse.decode(sparse.encode(values), values.size), values)


@given(gaps=st.binary(max_size=30), numbers=st.binary(max_size=30))
def test_any_bytes_are_a_sparse_segment_or_refused(gaps: bytes, numbers: bytes) -> None:
    with contextlib.suppress(RefusedError):
        assert sparse.decode((gaps, numbers), 1000).size == 1000


@given(
    shapes=st.lists(st.lists(st.integers(0, 4), max_size=3), max_size=5),
    cuts=st.lists(st.integers(0, 300), max_size=4),
)
def test_segments_of_steps_join_to_all_steps(shapes: list[list[int]], cuts: list[int]) -> None:
    layout = Layout([ParameterSpec(name=str(index), shape=tuple(shape)) for index, shape in enumerate(shapes)])
    grid = Grid(grid_id="g", steps=tuple(float(index + 1) for index in range(len(shapes))))
    n = layout.n_parameters
    bounds = sorted({0, n, *(cut for cut in cuts if cut < n)})
    joined = [layout.steps(grid.steps, start, stop) for start, stop in itertools.pairwise(bounds)]
    whole = layout.steps(grid.steps, 0, n)
    assert whole.size == n
    np.testing.assert_array_equal(np.concatenate([*joined, np.empty(0, np.float32)]), whole)
    for index, part in enumerate(layout.slices):
        assert (whole[part] == index + 1).all()
