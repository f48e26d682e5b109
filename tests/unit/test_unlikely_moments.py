"""Moments that hardly ever come: settings that change beside a combination, a look at a replay, a stop before the start."""

import asyncio
import gc
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import structlog

from fednats.codec.grid import MIN_STEP, adapt
from fednats.codec.layout import Layout
from fednats.config import AggregationSettings, DeltaSettings
from fednats.errors import CONFIG_EXIT, UnknownCommandError
from fednats.messages import Grid, ParameterSpec
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import Configured
from fednats.services.aggregator.fits import Fits
from fednats.services.aggregator.service import AggregatorService
from fednats.services.coordinator.service import CoordinatorService
from fednats.services.daemon.answers import Fit
from fednats.services.daemon.lifecycle import Daemon, until_stopped
from fednats.services.tier.tier import Tier
from fednats.storage.journal import Journal
from tests.makers import announcement

LAYOUT = Layout([ParameterSpec(name="w", shape=(4,))])


def test_a_grid_does_not_shrink_to_nothing() -> None:
    grid = Grid(grid_id="0-g", steps=(2.0**-90,))
    for _ in range(20):
        steps = grid.steps
        grid = adapt(grid, LAYOUT, np.full(4, 1e-37, np.float32), 0, 4, 127)
    assert grid.steps == steps == (MIN_STEP,)
    assert np.float32(MIN_STEP) * np.float32(127) / np.float32(127) == np.float32(MIN_STEP)


def fit(capacity: int = 500, robust: str = "none") -> Fit:
    aggregation = AggregationSettings.model_validate({"robust": robust})
    return Fit(DeltaSettings(), aggregation, 4, "k", n_chunks=1, max_total_weight=500, capacity=capacity)


async def test_a_combination_is_made_by_the_settings_of_its_own_version() -> None:
    """The coordinator was started again with other settings meanwhile; a region that starts sees the newest only."""
    fits = Fits()
    robust = AggregationSettings(robust="norm_bound")
    for event in (announcement(3, settings=robust), announcement(4, settings=AggregationSettings())):
        fits.note(event)
    fits.take(fit(), first_version=0)
    at_three, at_four = await fits.at(3), await fits.at(4)
    assert at_three is not None
    assert at_four is not None
    assert (at_three.aggregation.robust, at_four.aggregation.robust) == ("norm_bound", "none")


async def test_a_combination_of_another_packing_is_given_up() -> None:
    """Its weights would not fit the fields."""
    fits = Fits()
    fits.note(announcement(3))
    fits.take(fit(capacity=20), first_version=0)
    assert await fits.at(3) is None
    fits.take(fit(), first_version=5)
    assert await fits.at(3) is None, "of an earlier run"


@pytest.mark.parametrize("service", [AggregatorService, CoordinatorService])
async def test_a_command_that_a_tier_does_not_know_is_an_error(service: type[AggregatorService]) -> None:
    with pytest.raises(UnknownCommandError, match=r"Odd is not a command of the (aggregator|coordinator)") as raised:
        await service._execute(SimpleNamespace(), type("Odd", (), {})())  # type: ignore[arg-type]
    assert raised.value.exit_code == CONFIG_EXIT, "a supervisor that starts it again gains nothing"


async def test_the_status_is_not_looked_at_while_a_thread_replays(tmp_path: Path) -> None:
    file = tmp_path / "journal.sqlite"
    journal = Journal(file)
    journal.append([Configured(sites=("a",), regions=())], 1.0)
    journal.close()
    daemon = Daemon("aggregator", "north", "r", structlog.get_logger())
    looked: list[str] = []

    def status() -> dict[str, object]:
        looked.append("status")
        return {"state": "collecting", "accepted": 7}

    daemon.status = status
    replaying, go_on = threading.Event(), threading.Event()

    def held_up(_: object) -> None:
        replaying.set()
        go_on.wait(10)

    machine = Collector(Roster("r", "north", frozenset(), frozenset()), lambda event: event.settings.goal)
    tier = Tier(daemon, Journal(file), machine, None, held_up)  # type: ignore[arg-type]
    replay = asyncio.create_task(tier.replay())
    await asyncio.to_thread(replaying.wait, 10)
    looked.clear()
    said = daemon.describe()
    assert (said["state"], said["accepted"], looked) == ("replaying", 7, [])
    go_on.set()
    assert await replay == 1
    assert daemon.describe()["state"] == "collecting"


async def test_a_daemon_that_is_stopped_before_it_is_ready_leaves_nothing_unawaited(
    recwarn: pytest.WarningsRecorder,
) -> None:
    daemon = Daemon("aggregator", "north", "r", structlog.get_logger())
    daemon.stopping.set()

    async def send() -> None:
        await asyncio.Event().wait()

    async def finish() -> None:
        pass

    await until_stopped(daemon, {"send receipts": send()}, finish)
    gc.collect()
    assert [str(warning.message) for warning in recwarn] == []
