"""A large model over a long link: it fills the link, and no daemon holds more than a few models in memory."""

import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fednats.config import parse
from fednats.testbed.federation import FederationSettings
from fednats.testbed.launch import Running, running
from tests.e2e.ledgers import balanced
from tests.e2e.until import Statuses, closed, until

BYTES_OF_A_PARAMETER = 4
BYTES_OF_A_PARAMETER_IN_AN_UPDATE = 5.7
MBIT = 200
LIMIT_S = 500.0
BYTES_PER_S = MBIT * 1e6 / 8


@dataclass
class Watched:
    """The memory growth of each daemon and its worker, and the bytes across the link over time."""

    began: dict[int, int] = field(default_factory=dict)
    """Peak memory of each process when first seen, which is at its start."""
    growth: dict[str, int] = field(default_factory=dict)
    down: list[tuple[float, int]] = field(default_factory=list)
    up: list[tuple[float, int]] = field(default_factory=list)

    def look(self, federation: Running) -> None:
        link, now = federation.links["region-north"], time.monotonic()
        self.down.append((now, link.bytes_down))
        self.up.append((now, link.bytes_up))
        for name in ("coordinator", "aggregator-north", "site-a", "site-b"):
            daemon = federation.daemons[name].pid
            for process, peak in peaks(daemon):
                grown = peak - self.began.setdefault(process, peak)
                key = f"{name} {'daemon' if process == daemon else 'worker'}"
                self.growth[key] = max(self.growth.get(key, 0), grown)


def peaks(pid: int) -> Iterator[tuple[int, int]]:
    """Yield the peak resident bytes of a process and of all its descendants."""
    with suppress(FileNotFoundError, ProcessLookupError):
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
        yield pid, 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
        for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split():
            yield from peaks(int(child))


def share_used(samples: list[tuple[float, int]], first: int, last: int) -> float:
    """Return the share of the link's rate that was used for bytes number ``first`` to ``last``."""
    started = next(at for at, n_bytes in samples if n_bytes >= first)
    ended = next(at for at, n_bytes in samples if n_bytes >= last)
    return (last - first) / (ended - started) / BYTES_PER_S


@pytest.mark.timeout(LIMIT_S + 60)
@pytest.mark.parametrize(
    "width", [pytest.param(5_000, id="25M"), pytest.param(10_000, id="100M", marks=pytest.mark.long)]
)
async def test_a_large_model_fills_the_link_and_not_the_memory(tmp_path: Path, width: int) -> None:
    federation = parse(
        {
            "name": "big",
            "task": f"{Path(__file__).with_name('big_task.py')}:Big",
            "options": {"width": width},
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
    model, update = BYTES_OF_A_PARAMETER * width**2, int(BYTES_OF_A_PARAMETER_IN_AN_UPDATE * width**2)
    keyframe = int(0.9 * model)  # zstd saves 8 %
    assert share_used(watched.down, keyframe // 20, keyframe) >= 0.8
    assert share_used(watched.up, update // 20, update) >= 0.8
    for name, grown in watched.growth.items():
        limit = 2 * update if name.startswith("aggregator") else 3 * model
        assert grown <= limit, f"{name}: {grown / model:.2f} models; all: {watched.growth}"
