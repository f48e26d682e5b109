"""Put one federation through all faults at random; ``make soak SEED=3`` is the long form, with any seed."""

import os
from pathlib import Path

import pytest

from fednats.testbed.launch import running
from fednats.testbed.wan import WanSettings
from fednats.verify.joined import APPLIED
from tests.e2e.conftest import MakeFederation
from tests.e2e.ledgers import balanced
from tests.e2e.until import end_after, reached, takes_part, until
from tests.support.chaos import Chaos

SEED = int(os.environ.get("SOAK_SEED", "1"))
FAR = WanSettings(delay_ms=50)
"""Link between each site and its region."""


@pytest.mark.parametrize(
    "duration_s",
    [
        pytest.param(30.0, id="short"),
        pytest.param(300.0, id="long", marks=[pytest.mark.long, pytest.mark.timeout(560)]),
    ],
)
async def test_a_federation_survives_faults_at_random(
    make_federation: MakeFederation, tmp_path: Path, duration_s: float
) -> None:
    regions = {"north": ["a", "b"], "south": ["c", "d", "e"]}
    federation = make_federation(regions, stop={"max_versions": 100_000})
    far = {f"site-{site}": FAR for site in federation.sites}
    async with running(federation, tmp_path / "out", links=far) as federation_running:
        chaos = Chaos(federation_running, SEED)
        try:
            await until(federation_running, reached(2))
            await chaos.run(duration_s)
            for region in regions:
                await takes_part(federation_running, region)
            statuses = await end_after(federation_running, 2)
            ledger = await balanced(tmp_path / "out")
            assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"]
        except BaseException as error:
            error.add_note("\n".join([f"make soak SEED={SEED}; the faults were", *map(str, chaos.begun)]))
            raise
