"""Measure how late the daemons' event loops run while a federation trains and encrypts."""

import asyncio
import tempfile
from pathlib import Path

from fednats.config import StopSettings
from fednats.testbed import bench_federation

N_VERSIONS = 30


def run(n_versions: int = N_VERSIONS) -> list[dict[str, str | float]]:
    """Run a federation for ``n_versions``; return a row per daemon with its lags in ms, from its start on."""
    settings = bench_federation.federation(synchronous=False, stop=StopSettings(max_versions=n_versions))
    with tempfile.TemporaryDirectory(prefix="fednats-bench-") as folder:
        statuses, _ = asyncio.run(bench_federation.run(settings, Path(folder)))
    rows: list[dict[str, str | float]] = []
    for name, status in statuses.items():
        lag = status["loop_lag_ms"]
        rows.append({"daemon": name, "p50_ms": lag["p50"], "p99_ms": lag["p99"], "max_ms": lag["max"], "n": lag["n"]})
    return rows
