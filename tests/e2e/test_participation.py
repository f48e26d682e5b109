"""Hospitals and regions come and go: the others go on, and no sum ever has fewer sites than it must."""

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp

from fednats.testbed.launch import Running, running
from fednats.testbed.processes import DaemonProcess
from fednats.verify.joined import APPLIED
from fednats.web.server import PORT_FILE
from tests.e2e.conftest import MakeFederation
from tests.e2e.ledgers import balanced
from tests.e2e.until import ENDLESS, Statuses, end_after, reached, until
from tests.support.connected_bus import until as happens

PATIENCE_S = 60.0
"""Longest wait for a daemon to start, or for its presence to expire."""


async def further(federation: Running, n_versions: int) -> Statuses:
    """Wait for ``n_versions`` more versions."""
    now = await until(federation, reached(0))
    return await until(federation, reached(now["coordinator"]["version"] + n_versions))


async def metric(daemon: DaemonProcess, name: str) -> float:
    port = (daemon.state_dir / PORT_FILE).read_text(encoding="ascii")
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as response:
        lines = (await response.text()).splitlines()
    (value,) = (line.split()[1] for line in lines if line.split()[0] in {name, f"{name}_total"})
    return float(value)


async def becomes(daemon: DaemonProcess, name: str, value: float) -> None:
    """Wait until the metric ``name`` of ``daemon`` has the value ``value``."""

    async def has_value() -> bool:
        return await metric(daemon, name) == value

    await happens(has_value, PATIENCE_S)


async def is_present(daemon: DaemonProcess, count: int) -> None:
    """Wait until ``daemon`` sees ``count`` of its sources."""
    await becomes(daemon, "fednats_present", count)


def log_of(daemon: DaemonProcess, event: str) -> list[Mapping[str, Any]]:
    text = daemon.log_file.read_text(encoding="utf-8")
    lines = (json.loads(line) for line in text.splitlines() if line.startswith("{"))  # Python's own warnings are text
    return [line for line in lines if line["event"] == event]


def changes_of(daemon: DaemonProcess, source: str) -> list[str]:
    """Return the changes of presence that the daemon logged for one of its sources."""
    joined = log_of(daemon, "source_joined"), log_of(daemon, "source_left")
    lines = sorted((line for kind in joined for line in kind), key=lambda line: line["timestamp"])
    return [line["event"] for line in lines if line["source"] == source]


def sizes_of_sums(federation: Running, region: str) -> list[int]:
    """Return the number of distinct sites in each sum that the region sent, in order."""
    return [line["n_sites"] for line in log_of(federation.daemons[f"aggregator-{region}"], "aggregate_sent")]


async def test_two_of_three_go_on_while_the_third_is_late_or_down(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    federation = make_federation({"north": ["a", "b", "c"]}, aggregation={"goal": 3}, stop=ENDLESS)
    async with running(federation, output) as federation_running:
        aggregator, late = (federation_running.daemons[name] for name in ("aggregator-north", "site-c"))
        await late.kill()  # before it could say that it is there
        await further(federation_running, 3)
        before = len(sizes_of_sums(federation_running, "north"))
        await late.start()
        await is_present(aggregator, 3)
        await further(federation_running, 3)
        joined = len(sizes_of_sums(federation_running, "north"))
        await late.kill()
        await is_present(aggregator, 2)  # the region knows only by the key that was not renewed
        away = len(sizes_of_sums(federation_running, "north"))
        await further(federation_running, 3)
        alone = len(sizes_of_sums(federation_running, "north"))
        await late.start()
        await is_present(aggregator, 3)
        await further(federation_running, 3)
        sizes = sizes_of_sums(federation_running, "north")
        await end_after(federation_running, 2)
        await balanced(output)
    assert set(sizes[:before]) == {2}
    assert 3 in sizes[before:joined]
    assert set(sizes[away + 1 : alone]) == {2}
    assert 3 in sizes[alone:]
    assert min(sizes) == 2
    assert changes_of(aggregator, "c") == ["source_joined", "source_left", "source_joined"]


async def test_a_region_under_a_region_is_not_waited_for_while_it_is_down(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(
        {"europe": [], "north": ["a", "b"], "south": ["c", "d"]},
        regions={"europe": {}, "north": {"parent": "europe"}, "south": {"parent": "europe"}},
        delta={"tiers": 2},
        stop=ENDLESS,
    )
    async with running(federation, tmp_path / "out") as federation_running:
        europe, south = (federation_running.daemons[f"aggregator-{name}"] for name in ("europe", "south"))
        await until(federation_running, reached(1))
        await is_present(europe, 2)
        await south.kill()
        await is_present(europe, 1)
        await further(federation_running, 3)  # from sums of north alone
        assert set(sizes_of_sums(federation_running, "europe")[-2:]) == {2}
        await south.start()
        await is_present(europe, 2)
        await further(federation_running, 2)
        assert 4 in sizes_of_sums(federation_running, "europe")[-2:]
        await end_after(federation_running, 2)
        await balanced(tmp_path / "out")


async def test_one_region_goes_on_while_the_other_lacks_a_site_or_is_down(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    federation = make_federation(
        {"north": ["a", "b"], "south": ["c", "d"]}, aggregation={"region_goal": 2}, stop=ENDLESS
    )
    async with running(federation, output) as federation_running:
        daemons = federation_running.daemons
        coordinator, south = daemons["coordinator"], daemons["aggregator-south"]
        await until(federation_running, reached(0))
        await is_present(coordinator, 2)
        await further(federation_running, 2)

        waited = await metric(south, "fednats_waiting_for_sites")
        await daemons["site-d"].kill()
        await is_present(south, 1)
        await becomes(south, "fednats_waiting_for_sites", waited + 1)
        waiting = log_of(south, "waiting_for_sites")[-1]
        assert (waiting["n_present"], waiting["min_sites"]) == (1, 2)
        await is_present(coordinator, 1)  # south itself reports that it can send nothing
        sums = len(sizes_of_sums(federation_running, "south"))
        await further(federation_running, 3)
        assert len(sizes_of_sums(federation_running, "south")) == sums
        await daemons["site-d"].start()
        await is_present(coordinator, 2)
        await further(federation_running, 2)
        assert len(sizes_of_sums(federation_running, "south")) > sums

        await south.kill()
        await federation_running.servers.leaves["south"].kill()
        await is_present(coordinator, 1)
        await further(federation_running, 3)
        sums = len(sizes_of_sums(federation_running, "south"))
        await federation_running.servers.leaves["south"].start()
        await south.start()
        await is_present(coordinator, 2)
        await further(federation_running, 2)
        assert len(sizes_of_sums(federation_running, "south")) > sums
        assert changes_of(coordinator, "south")[-4:] == ["source_left", "source_joined"] * 2
        await end_after(federation_running, 2)
        await balanced(output)
        assert {*sizes_of_sums(federation_running, "north"), *sizes_of_sums(federation_running, "south")} == {2}


async def test_a_deadline_in_a_region_with_too_few_sites_is_said_and_counted_and_sends_nothing(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"]}, aggregation={"deadline_s": 0.5}, stop=ENDLESS)
    async with running(federation, tmp_path / "out") as federation_running:
        aggregator, late = (federation_running.daemons[name] for name in ("aggregator-north", "site-b"))
        await late.kill()  # before it could say that it is there
        await until(federation_running, lambda statuses: "aggregator-north" in statuses)

        async def counted() -> bool:
            entries = log_of(aggregator, "waiting_for_sites")[-2:]
            seen = [entry["n_present"] == entry["n_contributions"] == 1 for entry in entries]
            return seen == [True, True] and await metric(aggregator, "fednats_waiting_for_sites") >= 4

        await happens(counted, PATIENCE_S)
        assert log_of(aggregator, "waiting_for_sites")[-1]["min_sites"] == 2
        assert sizes_of_sums(federation_running, "north") == []
        await late.start()
        await further(federation_running, 2)
        await end_after(federation_running, 2)
        ledger = await balanced(tmp_path / "out")
        assert set(sizes_of_sums(federation_running, "north")) == {2}
    assert ledger.accepted[APPLIED] >= 2 * 4


async def test_a_hospital_whose_policy_the_run_breaks_takes_no_part_and_the_coordinator_sees_why(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("min_sites = 3")
    federation = make_federation({"north": ["a", "b", "c"]}, aggregation={"goal": 3}, stop=ENDLESS)
    async with running(federation, tmp_path / "out") as federation_running:
        await further(federation_running, 1)
        strict = federation_running.daemons["site-c"]
        await strict.stop()
        strict.settings = strict.settings.model_copy(update={"policy_file": policy})
        await strict.start()
        seen = await until(federation_running, lambda statuses: bool(statuses["coordinator"].get("declined")))
        why = "the run sums 2 sites, the policy says min_sites = 3"
        assert seen["coordinator"]["declined"] == {"site.c": why}
        before = len(sizes_of_sums(federation_running, "north"))
        statuses = await further(federation_running, 3)  # the others do not wait for the hospital
        assert set(sizes_of_sums(federation_running, "north")[before + 1 :]) == {2}
        assert statuses["site-c"]["state"] == "declined"
        policy.write_text("min_sites = 2")
        await strict.stop()
        await strict.start()
        await until(federation_running, lambda statuses: not statuses["coordinator"]["declined"])
        await is_present(federation_running.daemons["aggregator-north"], 3)
        await further(federation_running, 2)
        assert sizes_of_sums(federation_running, "north")[-1] == 3
        await end_after(federation_running, 2)
        await balanced(tmp_path / "out")
    told = log_of(federation_running.daemons["coordinator"], "takes_no_part")
    assert {(line["service"], line["why"]) for line in told} == {("site.c", why)}


async def test_outside_its_hours_a_hospital_evaluates_and_nobody_waits_for_it(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    """The goal is three updates: if the region waited for the third, no version would come until its hours begin."""
    policy = tmp_path / "policy.toml"
    begin, end = ((datetime.now().astimezone() + timedelta(hours=hours)).strftime("%H:%M") for hours in (6, 7))
    policy.write_text(f'hours = ["{begin}-{end}"]')
    federation = make_federation({"north": ["a", "b", "c"]}, aggregation={"goal": 3}, stop=ENDLESS)
    async with running(federation, tmp_path / "out") as federation_running:
        resting = federation_running.daemons["site-c"]
        await resting.stop()
        n_stored = len(log_of(resting, "update_stored"))
        resting.settings = resting.settings.model_copy(update={"policy_file": policy})
        await resting.start()
        now = await until(federation_running, lambda found: found.get("site-c", {}).get("state") == "outside hours")
        began = now["coordinator"]["version"]

        def evaluates_on(found: Statuses) -> bool:
            """Return whether site c has evaluated later versions, not only seen them."""
            return bool(found.get("site-c", {}).get("version", -1) >= began + 3)

        await until(federation_running, evaluates_on)
        assert set(sizes_of_sums(federation_running, "north")[-2:]) == {2}
        assert len(log_of(resting, "update_stored")) == n_stored
