"""The settings file of an aggregator that changes while it runs."""

import asyncio
from pathlib import Path

import pytest
import structlog
import tomli_w
from structlog.testing import capture_logs

from fednats.config import AggregatorSettings, load
from fednats.services.tier import roster

BUS = {"url": "tls://localhost:4222"}
RAW = {"run": "r", "state_dir": "state", "signers_file": "s.toml", "region": "north", "bus": BUS, "uplink": BUS}


async def test_new_sites_and_their_cases_are_taken_over_and_what_else_changed_or_cannot_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(roster, "REREAD_S", 0.01)
    path, part = tmp_path / "aggregator.toml", tmp_path / "part"

    def write(**changes: object) -> None:
        part.write_text(tomli_w.dumps({**RAW, **changes}))
        part.replace(path)

    write(sites=["a", "b"])
    held = load(path, AggregatorSettings, {})
    with capture_logs() as logs:
        changes = roster.changed_settings(structlog.get_logger(), path, held)
        waiting = asyncio.ensure_future(anext(changes))

        async def logged(event: str) -> None:
            while event not in {line["event"] for line in logs}:  # noqa: ASYNC110 - a log has no event to wait for
                await asyncio.sleep(0.01)

        write(sites=["müller klinik"])
        await asyncio.wait_for(logged("settings_unreadable"), 10)
        write(sites=["a", "b"], min_sites=3)
        await asyncio.wait_for(logged("settings_changed"), 10)
        write(sites=["b", "c"], min_sites=3)
        assert (await asyncio.wait_for(waiting, 10)).sites == ("b", "c")
        waiting = asyncio.ensure_future(anext(changes))
        write(sites=["b", "c"], min_sites=3, n_samples={"b": 120})
        assert (await asyncio.wait_for(waiting, 10)).n_samples == {"b": 120}
        await changes.aclose()
    assert "mueller-klinik" in logs[0]["error"]
    assert [line["settings"] for line in logs[1:]] == [["min_sites"]]


async def test_what_follows_the_roster_begins_anew_and_its_failure_is_no_secret() -> None:
    changed, begun, n_begun = asyncio.Event(), asyncio.Event(), 0

    async def follow() -> None:
        nonlocal n_begun
        n_begun += 1
        begun.set()
        if n_begun > 1:
            raise ValueError("the second")
        await asyncio.Event().wait()

    running = asyncio.create_task(roster.renewed(changed, follow))
    await begun.wait()
    changed.set()
    with pytest.raises(ValueError, match="the second"):
        await asyncio.wait_for(running, 10)
