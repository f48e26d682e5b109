"""Robust sums by real daemons: a region that can read updates sums them by the run's rule, and the books balance."""

from pathlib import Path

import pytest

from fednats.testbed.launch import running
from tests.e2e.conftest import MakeFederation
from tests.e2e.ledgers import balanced
from tests.e2e.until import closed, until


@pytest.mark.parametrize("rule", ["median", pytest.param("norm_bound", marks=pytest.mark.long)])
async def test_a_region_sums_by_the_rule_of_the_run(make_federation: MakeFederation, tmp_path: Path, rule: str) -> None:
    federation = make_federation(
        {"north": ["a", "b", "c"]},
        delta={"cipher": "none"},
        aggregation={"goal": "all", "robust": rule},
        stop={"max_versions": 6},
    )
    async with running(federation, tmp_path / "out") as federation_running:
        statuses = await until(federation_running, closed)
        ledger = await balanced(tmp_path / "out")
    assert statuses["coordinator"]["version"] == 6
    assert statuses["aggregator-north"]["refusals"] == {}
    assert ledger.accepted["applied"] == 18
    assert statuses["coordinator"]["best"]["metrics"]["auc"] > 0.9
