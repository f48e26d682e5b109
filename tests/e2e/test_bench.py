"""Run the benchmarks in their smallest form, and check what they report, but not the figures themselves."""

import pytest

from fednats.config import AggregationSettings
from fednats.testbed import bench_federation, bench_loop, bench_wan
from fednats.testbed.wan import WanSettings


def test_a_row_per_daemon_with_the_lag_of_its_loop() -> None:
    rows = bench_loop.run(n_versions=2)
    sites = [f"site-hospital-{number}" for number in range(1, 6)]
    assert [row["daemon"] for row in rows] == ["coordinator", "aggregator-north", "aggregator-south", *sites]
    for row in rows:
        assert list(row) == ["daemon", "p50_ms", "p99_ms", "max_ms", "n"]
        assert 0 < float(row["p50_ms"]) <= float(row["p99_ms"]) <= float(row["max_ms"])
        assert int(row["n"]) > 100


@pytest.mark.parametrize(
    "synchronous", [pytest.param(True, id="sync", marks=pytest.mark.long), pytest.param(False, id="async")]
)
def test_a_row_of_a_run_to_the_target(synchronous: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    row = bench_wan.measure(bench_wan.SCENARIOS[1], synchronous=synchronous, target=0.9)
    assert (row["scenario"], row["mode"]) == ("b-wan", "sync" if synchronous else "async")
    assert row["reached"]
    assert row["time_to_target_s"] > 0
    assert row["versions"] >= 1
    assert row["wan_bytes"] > 0
    assert row["downlink_bytes"] > 279_554
    assert row["uplink_bytes"] >= 2 * 279_554
    assert set(row["idle_share"]) == {f"hospital-{number}" for number in range(1, 6)}
    assert all(0 <= share <= 1 for share in row["idle_share"].values())
    assert (row["staleness_max"] == 0) == (row["staleness_mean"] == 0)
    if synchronous:
        assert row["staleness_max"] == 0
        assert row["updates"] == 5 * row["versions"]


def test_the_scenarios_differ_in_links_and_one_slow_site_only() -> None:
    lan, wan, slow = (
        bench_wan.placed(scenario, bench_federation.federation(synchronous=False)) for scenario in bench_wan.SCENARIOS
    )
    assert [scenario.name for scenario in bench_wan.SCENARIOS] == ["a-lan", "b-wan", "c-wan-slow-site"]
    bad, good = WanSettings(delay_ms=150, mbit=20), WanSettings()
    for federation, link in ((lan, good), (wan, bad), (slow, bad)):
        links = federation.links()
        assert {name: links[name] for name in ("region-north", "region-south")} == {
            "region-north": link,
            "region-south": link,
        }
    paces = [{name: site.options["step_s"] for name, site in made.sites.items()} for made in (lan, wan, slow)]
    assert paces[0] == paces[1]
    assert {name: round(paces[2][name] / paces[1][name]) for name in paces[1]} == {
        name: 10 if name == bench_wan.SLOW_SITE else 1 for name in paces[1]
    }


def test_the_modes_differ_in_their_goals_only() -> None:
    sync, fast = (bench_federation.federation(synchronous=synchronous) for synchronous in (True, False))
    assert sync.aggregation == AggregationSettings(goal="all", region_goal="all")
    assert sync.model_copy(update={"aggregation": fast.aggregation}) == fast
    assert sync.delta.cipher == "bfv"
