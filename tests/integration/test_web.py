"""The HTTP server of a daemon."""

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest

from fednats.config import WebSettings
from fednats.errors import ConfigError
from fednats.services.daemon.loop_lag import INTERVAL_S, LoopLag
from fednats.web.metrics import Metrics
from fednats.web.server import serving


async def test_health_readiness_metrics_and_status(tmp_path: Path) -> None:
    ready = False
    metrics = Metrics()
    metrics.refused.labels(reason="checksum").inc()
    async with (
        serving(
            WebSettings(), tmp_path, metrics, lambda: None if ready else "the bus is away", lambda: {"state": "waiting"}
        ) as port,
        aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session,
    ):
        assert (tmp_path / "web.port").read_text() == f"{port}\n"
        assert (await session.get("/healthz")).status == 200
        waiting = await session.get("/readyz")
        assert (waiting.status, await waiting.text()) == (503, "not ready: the bus is away\n")
        ready = True
        assert (await session.get("/readyz")).status == 200
        text = await (await session.get("/metrics")).text()
        assert 'fednats_refused_total{reason="checksum"} 1.0' in text
        assert await (await session.get("/status")).json() == {"state": "waiting"}


async def test_a_taken_port_is_named(tmp_path: Path) -> None:
    def never() -> str:
        return "never"

    async with serving(WebSettings(), tmp_path, Metrics(), never, dict) as port:
        with pytest.raises(ConfigError, match=str(port)):
            async with serving(WebSettings(port=port), tmp_path, Metrics(), never, dict):
                pass


async def test_a_loop_that_stood_still_shows_in_every_waking_it_missed() -> None:
    lag, observed = LoopLag(), list[float]()
    watching = asyncio.create_task(lag.watch(observed.append))
    await asyncio.sleep(3 * INTERVAL_S)
    time.sleep(10 * INTERVAL_S)  # noqa: ASYNC251 - the loop must be blocked here
    await asyncio.sleep(2 * INTERVAL_S)
    watching.cancel()
    long = [seconds for seconds in observed if seconds >= 4 * INTERVAL_S]
    assert len(long) >= 5
    assert max(long) >= 8 * INTERVAL_S
    assert lag.describe()["n"] == len(observed)
    assert lag.describe()["max"] == round(max(observed) * 1000, 2)
