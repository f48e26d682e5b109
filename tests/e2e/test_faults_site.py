"""Sites that are killed, cut off, out of disk or out of time: nothing is lost, nothing counts twice."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fednats import wire
from fednats.messages import Update
from fednats.protocol.events import ContributionArrived
from fednats.storage.local_model import model_folder
from fednats.testbed.launch import Running, running
from fednats.testbed.ledger import APPLIED
from fednats.testbed.wan import WanSettings
from fednats.web.server import PORT_FILE
from tests.e2e.conftest import MakeFederation
from tests.e2e.faults import events, found, in_state, outbox, wide
from tests.e2e.ledgers import balanced
from tests.e2e.until import Statuses, closed, reached, until

PAIR = {"north": ["a", "b"]}
"""A sum has updates of two sites in it: without the one, the other gets no further."""

UNSENT = "SELECT update_id FROM outgoing WHERE sent_at IS NULL AND dropped_at IS NULL ORDER BY sequence"
LONG_PASS = {"local_steps": 1500, "batch_size": 16, "learning_rate": 0.001}


async def test_a_site_killed_in_training_trains_again(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation(PAIR, training=LONG_PASS, stop={"max_versions": 2})
    async with running(federation, tmp_path / "out") as now:
        await until(now, reached(1))
        statuses = await until(now, in_state("site-a", "training"))
        await now.daemons["site-a"].kill()
        made_on = f"SELECT 1 FROM outgoing WHERE base_version = {statuses['site-a']['version']}"  # noqa: S608 - a number
        assert outbox(now, "a", made_on) == []
        await now.daemons["site-a"].start()
        await until(now, closed)
        assert len(outbox(now, "a", made_on)) == 1
        ledger = await balanced(tmp_path / "out")
    assert ledger.accepted == {APPLIED: 2 * 2}


async def test_a_site_killed_in_encrypting_makes_the_very_same_update_again(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(PAIR, **wide(tmp_path, 1_300_000), stop={"max_versions": 2})
    unfinished = "SELECT DISTINCT update_id FROM chunk WHERE update_id NOT IN (SELECT update_id FROM outgoing)"
    residual = "SELECT start, data FROM residual WHERE sequence = 2 ORDER BY start"

    async with running(federation, tmp_path / "out") as now:
        await found(now, lambda: outbox(now, "a", "SELECT 1 FROM outgoing") or None)
        await found(now, lambda: (outbox(now, "a", unfinished) and outbox(now, "a", residual)[3:]) or None)
        await now.daemons["site-a"].kill()
        [(killed_id,)] = outbox(now, "a", unfinished)
        left = outbox(now, "a", residual)
        await now.daemons["site-a"].start()
        await found(now, lambda: outbox(now, "a", "SELECT 1 FROM outgoing WHERE sequence = 2") or None)
        # Same version, seed and residual of the first update: what was worked out twice is equal, and counts once.
        assert outbox(now, "a", residual)[: len(left)] == left
        assert outbox(now, "a", f"SELECT 1 FROM chunk WHERE update_id = '{killed_id}'") == []  # noqa: S608 - an id
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
    assert ledger.accepted == {APPLIED: 2 * 2}


async def test_a_site_killed_between_outbox_and_bus_sends_afterwards(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(PAIR, training=LONG_PASS, stop={"max_versions": 2})
    async with running(federation, tmp_path / "out", {"site-a": WanSettings()}) as now:
        await until(now, reached(1))
        await until(now, in_state("site-a", "training"))
        now.links["site-a"].cut()
        [(update_id,)] = await found(now, lambda: outbox(now, "a", UNSENT) or None)
        await now.daemons["site-a"].kill()
        now.links["site-a"].restore()
        await now.daemons["site-a"].start()
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
    assert sent(now, "a").count(update_id) == 1
    assert ledger.accepted == {APPLIED: 2 * 2}


async def test_a_site_killed_between_bus_and_ack_is_known_again(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(PAIR, stop={"max_versions": 4})
    async with running(federation, tmp_path / "out", {"site-a": WanSettings(delay_ms=400)}) as now:

        def taken_and_not_acked() -> str | None:
            unsent = {identity for (identity,) in outbox(now, "a", UNSENT)}
            return next(iter(unsent & taken(now, "north")), None) if unsent else None

        update_id = await found(now, taken_and_not_acked)
        await now.daemons["site-a"].kill()
        assert (update_id,) in outbox(now, "a", UNSENT)
        await now.daemons["site-a"].start()
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
    assert sent(now, "a").count(update_id) == 1
    assert ledger.accepted == {APPLIED: 2 * 4}


async def test_a_site_trains_on_without_its_link_and_catches_up(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(PAIR, stop={"max_versions": 8})
    async with running(federation, tmp_path / "out", {"site-a": WanSettings()}) as now:
        await until(now, reached(1))
        link = now.links["site-a"]
        link.cut()
        link.restore()  # connections are reset: the site knows at once, and waits only as long as a break may take
        link.cut()
        statuses = await until(now, lambda statuses: outbox_of(statuses, "a").get("dropped", 0) >= 3)
        assert statuses["site-a"]["outbox"]["waiting"] == 4
        assert not statuses["site-a"]["ready"]
        sequences = [number for (number,) in outbox(now, "a", UNSENT.replace("update_id", "sequence", 1))]
        assert sequences[1:] == list(range(sequences[-1] - 2, sequences[-1] + 1))  # the first may be half sent
        version = statuses["coordinator"]["version"]
        link.restore()
        await until(now, closed)
        statuses = await until(now, lambda statuses: outbox_of(statuses, "a").get("waiting") == 0)
        ledger = await balanced(tmp_path / "out")
    assert version < 8
    assert '"training_on_without_the_bus"' in log_of(now, "a")
    assert ledger.updates["refused: Reason.TOO_STALE"] == 0
    assert set(ledger.accepted) <= {APPLIED, "left over above"}


async def test_sending_goes_on_where_a_killed_site_was(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = large_and_plain(make_federation, tmp_path, 4_000_000)
    async with running(federation, tmp_path / "out", {"site-a": WanSettings(mbit=24)}) as now:
        link = now.links["site-a"]
        [(head,)] = await found(now, lambda: outbox(now, "a", "SELECT head FROM outgoing") or None)
        before = link.bytes_up
        n_bytes = wire.unpack(head, Update).payload.n_bytes
        await found(now, lambda: link.bytes_up > before + n_bytes / 2 or None)
        await now.daemons["site-a"].kill()
        assert outbox(now, "a", "SELECT 1 FROM outgoing WHERE sent_chunks > 0 AND sent_at IS NULL")
        await now.daemons["site-a"].start()
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
        assert n_bytes < link.bytes_up - before < 1.5 * n_bytes
    assert ledger.accepted == {APPLIED: 2}


async def test_fetching_goes_on_where_a_killed_site_was(make_federation: MakeFederation, tmp_path: Path) -> None:
    n_parameters = 2_000_000
    federation = large_and_plain(make_federation, tmp_path, n_parameters)
    async with running(federation, tmp_path / "out", {"site-a": WanSettings(mbit=24)}) as now:
        link = now.links["site-a"]
        folder = model_folder(now.output / "site-a")
        n_bytes = 4 * n_parameters

        def half_fetched() -> bool | None:
            return sum(file.stat().st_size for file in folder.glob("frame-*")) > n_bytes / 2 or None

        await found(now, half_fetched)
        await now.daemons["site-a"].kill()
        await now.daemons["site-a"].start()
        await until(now, in_state("site-a", "training"))
        assert link.bytes_down < 1.4 * n_bytes
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
    assert ledger.accepted == {APPLIED: 2}


async def test_a_full_disk_stops_a_site_until_there_is_room(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation(
        {"north": ["a", "b", "c"]},
        **wide(tmp_path, 100_000),
        training={"local_steps": 100, "batch_size": 16, "learning_rate": 0.01},
        stop={"max_versions": 18},
    )
    state_dir = tmp_path / "out" / "site-a"
    with small_disk(state_dir, n_bytes=16 * 2**20):
        (state_dir / "daemon.log").symlink_to(tmp_path / "site-a.log")  # a log is not kept on the disk of the state
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
    versions = [failure["version"] for failure in failures]
    assert len(versions) == len(set(versions))  # once for every version: it does not spin
    assert any("outbox.sqlite" in failure["error"] for failure in failures)
    assert all("Make room on its disk" in failure["error"].replace("make", "Make") for failure in failures)


async def test_clocks_that_are_a_day_off_change_nothing(
    make_federation: MakeFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = faketime()
    federation = make_federation({"north": ["a", "b", "c"]}, stop={"max_versions": 12})
    async with running(federation, tmp_path / "out") as now:
        await until(now, reached(1))
        for site, offset in (("a", "+1d"), ("b", "-1d")):
            await now.daemons[f"site-{site}"].kill()
            with monkeypatch.context() as patched:
                patched.setenv("LD_PRELOAD", str(library))
                patched.setenv("FAKETIME", offset)
                patched.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
                await now.daemons[f"site-{site}"].start()
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
        newest = "SELECT julianday(sent_at) FROM outgoing WHERE sent_at IS NOT NULL ORDER BY sequence DESC LIMIT 1"
        days = {site: outbox(now, site, newest)[0][0] for site in "abc"}
    assert days["a"] - days["c"] == pytest.approx(1, abs=0.1)
    assert days["b"] - days["c"] == pytest.approx(-1, abs=0.1)
    assert ledger.accepted[APPLIED] >= 2 * 12
    assert not [fate for fate in ledger.updates if fate.startswith("refused")]


# --- what they share ----------------------------------------------------------------------------------------------


def large_and_plain(make_federation: MakeFederation, folder: Path, n_parameters: int) -> Any:
    """One version of a model that a slow link takes seconds for, in many small chunks."""
    return make_federation(
        PAIR,
        **wide(folder, n_parameters),
        training={"local_steps": 2, "batch_size": 16, "learning_rate": 0.01},
        delta={"cipher": "none", "chunk_bytes": 16 * 1024},
        stop={"max_versions": 1},
    )


def outbox_of(statuses: Statuses, site: str) -> dict[str, int]:
    counts: dict[str, int] = statuses.get(f"site-{site}", {}).get("outbox", {})
    return counts


def log_of(now: Running, site: str) -> str:
    return now.daemons[f"site-{site}"].log_file.read_text(encoding="utf-8")


def logged(now: Running, site: str, event: str) -> list[dict[str, Any]]:
    lines = (line for line in log_of(now, site).splitlines() if f'"event": "{event}"' in line)
    return [json.loads(line) for line in lines]


def job_failures(now: Running, site: str) -> list[dict[str, Any]]:
    return logged(now, site, "job_failed")


def sent(now: Running, site: str) -> list[str]:
    return [line["update_id"] for line in logged(now, site, "update_sent")]


def taken(now: Running, region: str) -> set[str]:
    arrived = [event for event in events(now, f"aggregator-{region}") if isinstance(event, ContributionArrived)]
    return {event.head.update_id for event in arrived if isinstance(event.head, Update)}


async def answers(state_dir: Path, page: str) -> int:
    port = int((state_dir / PORT_FILE).read_text(encoding="ascii"))
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/{page}") as response:
        return response.status


@contextmanager
def small_disk(folder: Path, n_bytes: int) -> Iterator[None]:
    """Mount a file system of ``n_bytes`` at ``folder``."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={n_bytes}", "fednats-test", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"this test fills a small disk and must be root to mount one: {done.stderr}"
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(ballast: Path, *, but_for: int) -> None:
    """Leave only so many bytes of the disk free."""
    free = os.statvfs(ballast.parent)
    with ballast.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, file.tell() + free.f_bavail * free.f_frsize - but_for)


def faketime() -> Path:
    found_at = next(iter(sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), None)
    assert found_at is not None, "this test sets the clock of a process: install Debian's package faketime"
    return found_at
