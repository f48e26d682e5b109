"""Every fault at random, for minutes: at the end the books balance to the update."""

import os
from pathlib import Path

import pytest

from fednats.testbed.chaos import Chaos
from fednats.testbed.launch import running
from fednats.testbed.ledger import APPLIED
from fednats.testbed.wan import WanSettings
from tests.e2e.conftest import MakeFederation
from tests.e2e.ledgers import balanced
from tests.e2e.until import closed, reached, until

START_S = 15.0
AFTERWARDS_S = 12.0
LINK = WanSettings(delay_ms=20, jitter_ms=5, mbit=100)


@pytest.mark.parametrize(
    "duration_s", [pytest.param(25.0, id="short"), pytest.param(300.0, id="five-minutes", marks=pytest.mark.long)]
)
@pytest.mark.timeout(600)
async def test_nothing_is_lost_and_nothing_counts_twice(
    make_federation: MakeFederation, tmp_path: Path, duration_s: float
) -> None:
    seed = int(os.environ.get("SEED", "1"))
    federation = make_federation(
        {"north": ["a", "b", "c"], "south": ["d", "e"]},
        stop={"max_versions": 1_000_000, "max_wall_s": START_S + duration_s + AFTERWARDS_S},
    )
    links = {f"site-{name}": LINK for name in federation.sites} | {"coordinator": LINK}
    output = tmp_path / "out"
    async with running(federation.with_wan(LINK), output, links=links) as federation_running:
        before = await until(federation_running, reached(2))
        chaos = Chaos(federation_running, seed)
        await chaos.run(duration_s)
        statuses = await until(federation_running, closed)
        ledger = await balanced(output)
    print(f"seed {seed}: {len(chaos.done)} faults: {', '.join(chaos.done)}; {ledger.line}")  # noqa: T201 - for make soak
    assert ledger.accepted[APPLIED] > before["coordinator"]["n_updates"], chaos.done
    assert statuses["coordinator"]["reason"] == "max_wall_s reached"
