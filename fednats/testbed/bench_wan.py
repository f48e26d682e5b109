"""Measure the cost of waiting: synchronous and asynchronous training to the same target, on good and bad links."""

import asyncio
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from fednats.config import StopSettings
from fednats.testbed import bench_federation, paced_task
from fednats.testbed.federation import FederationSettings
from fednats.testbed.wan import WanSettings

TARGET_METRIC = "auc"
TARGET = 0.995
"""AUC that synchronous training reaches in about a dozen rounds, whatever the links."""

MAX_VERSIONS = 1000
MAX_WALL_S = 300.0
STEP_S = 0.015
"""Duration of a local step. A pass takes 1.5 s, nearly all of it asleep."""

SLOW_SITE = "hospital-2"
SLOW_FACTOR = 10.0
BAD_LINK = WanSettings(delay_ms=150, mbit=20)


class Scenario(NamedTuple):
    """One combination of links and sites; None means good links, or no slow site."""

    name: str
    wan: WanSettings | None
    slow_site: str | None


SCENARIOS = (
    Scenario("a-lan", None, None),
    Scenario("b-wan", BAD_LINK, None),
    Scenario("c-wan-slow-site", BAD_LINK, SLOW_SITE),
)


def run(target: float = TARGET) -> list[dict[str, Any]]:
    """Run every scenario in both modes until the federation's AUC reaches ``target``; return a row for each.

    Task, seed and local work are always the same; the modes differ only in when a version is made. Times run from the
    coordinator's start to the publication of the first version at the target.
    """
    return [
        measure(scenario, synchronous=synchronous, target=target)
        for scenario in SCENARIOS
        for synchronous in (True, False)
    ]


def measure(scenario: Scenario, *, synchronous: bool, target: float) -> dict[str, Any]:
    """Run one scenario in one mode."""
    stop = StopSettings(
        max_versions=MAX_VERSIONS,
        max_wall_s=MAX_WALL_S,
        target_metric=TARGET_METRIC,
        target=target,
        stop_at_target=True,
    )
    settings = placed(scenario, bench_federation.federation(synchronous=synchronous, stop=stop))
    with tempfile.TemporaryDirectory(prefix="fednats-bench-") as folder:
        _, figures = asyncio.run(bench_federation.run(settings, Path(folder)))
    return {
        "scenario": scenario.name,
        "mode": figures.mode,
        "target": target,
        "reached": figures.time_to_target_s is not None,
        "time_to_target_s": figures.time_to_target_s,
        "versions": figures.versions,
        "updates": figures.updates_accepted,
        "uplink_bytes": figures.uplink_bytes,
        "downlink_bytes": figures.downlink_bytes,
        "wan_bytes": figures.wan_bytes,
        "staleness_mean": round(figures.staleness.mean, 2),
        "staleness_max": figures.staleness.max,
        "idle_share": {name: round(site.idle_share, 3) for name, site in figures.site_figures.items()},
    }


def placed(scenario: Scenario, federation: FederationSettings) -> FederationSettings:
    """Return ``federation`` with the scenario's links and its slow site."""
    sites = {
        name: site.model_copy(
            update={"options": {**site.options, "step_s": STEP_S * (SLOW_FACTOR if name == scenario.slow_site else 1)}}
        )
        for name, site in federation.sites.items()
    }
    paced = federation.model_copy(update={"task": f"{paced_task.__file__}:PacedBreastCancer", "sites": sites})
    return paced if scenario.wan is None else paced.with_wan(scenario.wan)
