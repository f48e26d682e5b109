"""Whole federations as processes, over real servers, with real encryption."""

import json
from collections import Counter
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from safetensors.numpy import load_file

from fednats.messages import Aggregate, Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import Combined, ContributionArrived, Event
from fednats.storage.journal import Journal
from fednats.testbed.launch import run_federation, running
from tests.e2e.conftest import MakeFederation
from tests.e2e.until import closed, reached, until

HeadT = TypeVar("HeadT")


async def test_two_regions_train_one_model(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, stop={"max_versions": 6, "target": 0.9})
    output = tmp_path / "out"
    summary = await run_federation(federation, output)
    assert summary.versions == 6
    assert summary.cipher == "bfv"
    assert summary.updates_accepted >= 12
    assert summary.federated["auc"] > 0.95
    assert summary.federated["accuracy"] > summary.mean_alone["accuracy"] - 0.02
    assert summary.time_to_target_s is not None
    assert summary.wan_bytes > 2 * 6 * 1000
    assert json.loads((output / "summary.json").read_text())["federated"] == summary.federated
    assert "auc" in (output / "report.html").read_text()
    model = load_file(output / "model.safetensors")
    assert {name: array.shape for name, array in model.items()} == {
        "0.weight": (16, 30),
        "0.bias": (16,),
        "2.weight": (2, 16),
        "2.bias": (2,),
    }
    assert all(np.isfinite(array).all() for array in model.values())
    secret = (output / "keys" / "coordinator.secret").read_bytes()
    holders = [file for file in output.glob("**/*") if file.is_file() and secret[:4096] in file.read_bytes()]
    assert holders == [output / "keys" / "coordinator.secret"]
    assert (output / "keys" / "coordinator.secret").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("cipher", ["bfv", "none"])
async def test_synchronous_rounds_take_one_update_of_every_site(
    make_federation: MakeFederation, tmp_path: Path, cipher: str
) -> None:
    federation = make_federation(
        {"north": ["a", "b"], "south": ["c", "d"]},
        aggregation={"goal": "all", "region_goal": "all"},
        delta={"cipher": cipher},
        stop={"max_versions": 3},
    )
    async with running(federation, tmp_path / "out") as federation_running:
        statuses = await until(federation_running, closed)
    assert statuses["coordinator"]["n_updates"] == 4 * 3
    assert statuses["coordinator"]["staleness_max"] == 0


async def test_aggregators_stand_under_aggregators(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation(
        {"europe": [], "north": ["a", "b"], "south": ["c", "d"]},
        regions={"europe": {}, "north": {"parent": "europe"}, "south": {"parent": "europe"}},
        delta={"tiers": 2},
        stop={"max_versions": 3},
    )
    async with running(federation, tmp_path / "out") as federation_running:
        statuses = await until(federation_running, closed)
    assert statuses["coordinator"]["n_updates"] >= 12
    assert statuses["coordinator"]["refusals"] == {}
    metrics = [entry["metrics"]["auc"] for entry in statuses["coordinator"]["history"]]
    assert metrics[-1] > metrics[0]


async def test_a_federation_without_leaves_is_the_same_federation(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"]}, leaves=False, stop={"max_versions": 3})
    async with running(federation, tmp_path / "out") as federation_running:
        assert not federation_running.servers.leaves
        statuses = await until(federation_running, closed)
    assert statuses["coordinator"]["n_updates"] == 6


async def test_killed_daemons_come_back_and_nothing_counts_twice(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, stop={"max_versions": 12})
    async with running(federation, tmp_path / "out") as federation_running:
        for at_version, name in ((2, "site-a"), (3, "aggregator-north"), (4, "coordinator")):
            await until(federation_running, reached(at_version))
            await federation_running.daemons[name].kill()
            await federation_running.daemons[name].start()
        statuses = await until(federation_running, closed)
    assert statuses["coordinator"]["version"] == 12
    output = tmp_path / "out"
    coordinator = list(Journal(output / "coordinator" / "journal.sqlite").replay())
    applied = [event.combination_id for event in coordinator if isinstance(event, Combined)]
    assert len(applied) == len(set(applied)) == 12
    for region in ("north", "south"):
        events = list(Journal(output / f"aggregator-{region}" / "journal.sqlite").replay())
        summed = [event.combination_id for event in events if isinstance(event, Combined)]
        assert len(summed) == len(set(summed))
        counted = updates_in_sums(region, events)
        assert len(counted) >= 2 * len(summed)
        assert max(counted.values()) == 1
        arrived = {head.aggregate_id for head in heads(coordinator, Aggregate) if head.region == region}
        assert arrived <= set(summed)


def updates_in_sums(region: str, events: list[Event]) -> Counter[str]:
    """Replay a region's journal: how often each update is in a sum that was published."""
    machine = Collector(Roster("small", region, frozenset(), frozenset()), lambda event: event.settings.goal)
    counted: Counter[str] = Counter()
    for event in events:
        if isinstance(event, Combined) and machine.in_flight is not None:
            counted.update(part.head.update_id for part in machine.in_flight.parts if isinstance(part.head, Update))
        machine.handle(event)
    return counted


def heads(events: list[Event], kind: type[HeadT]) -> list[HeadT]:
    return [event.head for event in events if isinstance(event, ContributionArrived) and isinstance(event.head, kind)]
