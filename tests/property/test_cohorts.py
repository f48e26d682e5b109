"""Whoever reports when, and asks for whatever: no sums that are given out tell of too few sites together."""

import itertools
from random import Random

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from fednats.config import AggregationSettings
from fednats.messages import Evaluation
from fednats.protocol.admission import Roster
from fednats.protocol.cohorts import Cohorts
from fednats.protocol.collector import Collector
from fednats.protocol.events import Command, EvaluationArrived, PresenceChanged, SumEvaluations
from tests.makers import announcement, evaluation

SITES = "abcdefg"


@settings(derandomize=True, deadline=None, max_examples=300)
@given(
    st.lists(st.integers(2, 4), min_size=len(SITES), max_size=len(SITES)),
    st.lists(st.frozensets(st.sampled_from(SITES)), max_size=12),
)
def test_every_difference_is_of_as_many_sites_as_each_of_them_asks_for(
    asked: list[int], reports: list[frozenset[str]]
) -> None:
    asks = dict(zip(SITES, asked, strict=True))
    cohorts = Cohorts()
    sums = [frozenset[str]()]
    for report in reports:
        parts = cohorts.largest({site: asks[site] for site in report})
        cohorts.give_out(parts, asks)
        sums.append(frozenset[str]().union(*parts))
        assert sums[-1] <= report
    for one, other in itertools.product(sums, sums):
        assert all(len(one - other) >= asks[site] for site in one - other)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(
    st.integers(2, 4),
    st.lists(st.tuples(st.frozensets(st.sampled_from(SITES)), st.frozensets(st.sampled_from(SITES))), max_size=20),
    st.randoms(),
)
def test_no_combination_of_sums_is_of_fewer_sites_than_min_sites(
    min_sites: int, versions: list[tuple[frozenset[str], frozenset[str]]], random: Random
) -> None:
    """What sums tell is the space that they span; nothing in it is about fewer sites than ``min_sites``."""
    machine = Collector(Roster("r", "north", frozenset(SITES), frozenset()), lambda _: 1)
    machine.handle(announcement(99, settings=AggregationSettings(min_sites=min_sites)))
    commands: list[Command] = []
    for version, (present, reported) in enumerate(versions):
        commands += machine.handle(PresenceChanged(present=tuple(present)))
        for site in random.sample(sorted(reported), len(reported)):
            late = evaluation(site, max(0, version - random.choice([0, 0, 0, 1, 6])))
            commands += machine.handle(EvaluationArrived(evaluation=late))
    sums = [
        [any(isinstance(part, Evaluation) and part.site == site for part in command.parts) for site in SITES]
        for command in commands
        if isinstance(command, SumEvaluations)
    ]
    if not sums:
        return
    told = np.array(sums, float)  # [sums, sites]
    rank = np.linalg.matrix_rank(told)
    for few in range(1, 2 ** len(SITES)):
        about = np.array([few >> index & 1 for index in range(len(SITES))], float)
        if about.sum() < min_sites:
            assert np.linalg.matrix_rank(np.vstack([told, about])) > rank
