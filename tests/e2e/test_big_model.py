"""A model of 100,000,000 parameters over a long link: the link is filled, and no daemon holds more than a few models."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fednats.config import parse
from fednats.testbed.federation import FederationSettings
from fednats.testbed.launch import Running, running
from tests.e2e.ledgers import balanced
from tests.e2e.until import Statuses, closed, until

WIDTH = 10_000
MODEL_BYTES = 4 * WIDTH**2
UPDATE_BYTES_AT_LEAST = 5.7 * WIDTH**2
MBIT = 200
LIMIT_S = 500.0
BYTES_PER_S = MBIT * 1e6 / 8


@dataclass
class Watched:
    """The largest resident memory of each daemon and of its worker, and what crossed the link when."""

    peaks: dict[str, int] = field(default_factory=dict)
    down: list[tuple[float, int]] = field(default_factory=list)
    up: list[tuple[float, int]] = field(default_factory=list)

    def look(self, federation: Running) -> None:
        link, now = federation.links["region-north"], time.monotonic()
        self.down.append((now, link.bytes_down))
        self.up.append((now, link.bytes_up))
        for name in ("coordinator", "aggregator-north", "site-a", "site-b"):
            for role, peak in resident(federation.daemons[name].pid):
                key = f"{name} {role}"
                self.peaks[key] = max(self.peaks.get(key, 0), peak)


def resident(pid: int) -> Iterator[tuple[str, int]]:
    """Yield the peak resident bytes of a process and of its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    for role, process in [("daemon", str(pid)), *(("worker", child) for child in children)]:
        try:
            status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
        except FileNotFoundError:
            continue
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
        yield role, int(peak.split()[1]) * 1024


def share_used(samples: list[tuple[float, int]], first: int, last: int) -> float:
    """Share of the link's rate at which bytes number ``first`` to ``last`` crossed it."""
    started = next(at for at, n_bytes in samples if n_bytes >= first)
    ended = next(at for at, n_bytes in samples if n_bytes >= last)
    return (last - first) / (ended - started) / BYTES_PER_S


@pytest.mark.timeout(LIMIT_S + 60)
async def test_a_hundred_million_parameters_fill_the_link_and_not_the_memory(tmp_path: Path) -> None:
    federation = parse(
        {
            "name": "big",
            "task": f"{Path(__file__).with_name('big_task.py')}:Big",
            "options": {"width": WIDTH},
            "training": {"local_steps": 1, "batch_size": 2, "learning_rate": 0.01, "momentum": 0.0},
            "regions": {"north": {"wan": {"delay_ms": 150, "mbit": MBIT}}},
            "sites": {"a": {"region": "north"}, "b": {"region": "north"}},
            "stop": {"max_versions": 1},
        },
        FederationSettings,
        source="test",
    )
    watched = Watched()
    async with running(federation, tmp_path / "out") as federation_running:

        def look(statuses: Statuses) -> bool:
            watched.look(federation_running)
            return closed(statuses)

        statuses = await until(federation_running, look, limit_s=LIMIT_S)
        await balanced(tmp_path / "out")
    assert statuses["coordinator"]["n_updates"] == 2
    keyframe = int(0.9 * MODEL_BYTES)  # zstd takes 8 % off
    assert share_used(watched.down, keyframe // 20, keyframe) >= 0.8
    assert share_used(watched.up, int(UPDATE_BYTES_AT_LEAST) // 20, int(UPDATE_BYTES_AT_LEAST)) >= 0.8
    for name, peak in watched.peaks.items():
        limit = 2 * UPDATE_BYTES_AT_LEAST if name.startswith("aggregator") else 3 * MODEL_BYTES
        assert peak <= limit, f"{name}: {peak / MODEL_BYTES:.2f} models; all: {watched.peaks}"
