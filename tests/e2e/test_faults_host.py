"""A site with a full disk goes on when there is room; a wrong clock changes nothing."""

import os
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fednats.testbed.launch import Running, running
from fednats.verify.joined import APPLIED
from fednats.web.server import PORT_FILE
from tests.e2e.conftest import MakeFederation
from tests.e2e.faults import found, logged, outbox, outbox_of, wide
from tests.e2e.ledgers import balanced
from tests.e2e.until import closed, reached, until
from tests.small_disk import small_disk
from tests.support.hosts import clock_off


async def test_a_full_disk_stops_a_site_until_there_is_room(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation(
        {"north": ["a", "b", "c"]},
        **wide(tmp_path, 100_000),
        training={"local_steps": 100, "batch_size": 16, "learning_rate": 0.01},
        stop={"max_versions": 18},
    )
    state_dir = tmp_path / "out" / "site-a"
    with small_disk(state_dir, n_bytes=16 * 2**20):
        (state_dir / "daemon.log").symlink_to(tmp_path / "site-a.log")  # the log is on another disk than the state
        async with running(federation, tmp_path / "out") as now:
            await until(now, lambda statuses: outbox_of(statuses, "a").get("sent", 0) >= 1)
            ballast = state_dir / "ballast"
            fill(ballast, but_for=600 * 1024)  # room for a model and one chunk of an update
            await found(now, lambda: job_failures(now, "a")[1:] or None)
            fill(ballast, but_for=0)
            n_failures = len(job_failures(now, "a"))
            await found(now, lambda: job_failures(now, "a")[n_failures + 1 :] or None)
            assert await answers(state_dir, "readyz") == 200
            failures = job_failures(now, "a")
            n_stored = len(logged(now, "site-a", "update_stored"))
            assert (
                n_stored <= len(logged(now, "site-a", "trained")) <= n_stored + 1
            )  # a pass that is stored is not made again
            ballast.unlink()
            before = await until(now, lambda statuses: "site-a" in statuses)
            after = await until(now, lambda s: outbox_of(s, "a")["sent"] > outbox_of(before, "a")["sent"])
            await until(now, closed)
            assert after["coordinator"]["version"] < 18
            ledger = await balanced(tmp_path / "out")
            orphans = (
                "SELECT 1 FROM chunk WHERE update_id NOT IN (SELECT update_id FROM outgoing WHERE sent_at IS NULL)"
            )
            assert outbox(now, "a", orphans) == []
        assert ledger.accepted[APPLIED] >= 2 * 18
    assert len(failures) <= 18  # once for each version, so it does not spin
    assert any("outbox.sqlite" in failure["error"] for failure in failures)
    assert all("Make room on its disk" in failure["error"].replace("make", "Make") for failure in failures)


async def test_clocks_that_are_a_day_off_change_nothing(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation({"north": ["a", "b", "c"]}, stop={"max_versions": 12})
    async with running(federation, tmp_path / "out") as now:
        await until(now, reached(1))
        for site, offset in (("a", "+1d"), ("b", "-1d")):
            await now.daemons[f"site-{site}"].kill()
            now.daemons[f"site-{site}"].environment = clock_off(offset)
            await now.daemons[f"site-{site}"].start()
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
        newest = "SELECT julianday(sent_at) FROM outgoing WHERE sent_at IS NOT NULL ORDER BY sequence DESC LIMIT 1"
        days = {site: outbox(now, site, newest)[0][0] for site in "abc"}
    assert days["a"] - days["c"] == pytest.approx(1, abs=0.1)
    assert days["b"] - days["c"] == pytest.approx(-1, abs=0.1)
    assert ledger.accepted[APPLIED] >= 2 * 12
    assert not [fate for fate in ledger.updates if fate.startswith("refused")]


def job_failures(now: Running, site: str) -> list[dict[str, Any]]:
    return logged(now, f"site-{site}", "job_failed")


async def answers(state_dir: Path, page: str) -> int:
    port = int((state_dir / PORT_FILE).read_text(encoding="ascii"))
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/{page}") as response:
        return response.status


def fill(ballast: Path, *, but_for: int) -> None:
    """Fill the disk, leaving ``but_for`` bytes free."""
    free = os.statvfs(ballast.parent)
    with ballast.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, file.tell() + free.f_bavail * free.f_frsize - but_for)
