"""The federation that the benchmarks run: five hospitals in two regions, 279,554 parameters, encrypted."""

import asyncio
from pathlib import Path

from fednats.config import ServerSettings, TrainingSettings
from fednats.testbed.federation import FederationSettings, demo_federation
from fednats.testbed.launch import COORDINATOR, running
from fednats.testbed.summary import RunFigures, Statuses, run_figures, with_newest

SEED = 7
HIDDEN = (512, 512)
TRAINING = TrainingSettings(local_steps=100, batch_size=16, optimizer="sgd", learning_rate=0.002, momentum=0.9)
SERVER = ServerSettings(learning_rate=0.5)
_POLL_S = 0.2


def federation(*, synchronous: bool, **changes: object) -> FederationSettings:
    """Return the settings of the federation; ``changes`` replace some of them."""
    made = demo_federation(
        "breast-cancer", n_sites=5, n_regions=2, seed=SEED, cipher="bfv", synchronous=synchronous, data=None
    )
    return made.model_copy(
        update={"options": {"hidden": list(HIDDEN)}, "training": TRAINING, "server": SERVER, **changes}
    )


async def run(settings: FederationSettings, output: Path) -> tuple[Statuses, RunFigures]:
    """Run a federation until the coordinator closes the run; return the last statuses of its daemons and the figures.

    Raises:
        FednatsError: a daemon died.
    """
    statuses: Statuses = {}
    async with running(settings, output) as now:
        while statuses.get(COORDINATOR, {}).get("state") != "closed":
            now.daemons.check()
            statuses = with_newest(statuses, await now.daemons.statuses())
            await asyncio.sleep(_POLL_S)
    ordered = {daemon.name: statuses[daemon.name] for daemon in now.daemons}
    return ordered, run_figures(settings, ordered, now.wan_bytes)
