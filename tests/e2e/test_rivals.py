"""A copied machine: of two coordinators, or two aggregators of a region, the live one goes on and the other ends."""

from pathlib import Path

from fednats.subjects import HUB
from fednats.testbed.launch import Running, running
from fednats.testbed.processes import DaemonProcess
from fednats.testbed.wan import WanSettings
from tests.e2e.conftest import MakeFederation
from tests.e2e.copies import copied, frozen_copy, goes_on, puts_in_place_of
from tests.e2e.faults import found, logged
from tests.e2e.ledgers import balanced
from tests.e2e.until import ENDLESS, end_after, reached, takes_part, until, version_now

REGION = "aggregator-north"


async def test_of_two_copies_the_live_one_goes_on_and_the_other_ends(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, delta={"cipher": "none"}, stop=ENDLESS)
    async with running(federation, tmp_path / "out", {"coordinator": WanSettings()}) as now:
        await until(now, reached(2))
        for name in ("coordinator", REGION):
            await a_copy_beside_a_live_one_ends(now, name, tmp_path / f"beside-{name}")
        await until(now, reached(version_now(now) + 2))
        await a_coordinator_that_was_cut_off_ends_when_it_is_back(now, tmp_path / "taken-over")
        await an_aggregator_that_stood_still_ends_when_it_goes_on(now, tmp_path / "taken-over-north")
        await takes_part(now, "north")
        await end_after(now, 2)
        await now.daemons.stop("site")
        ledger = await balanced(tmp_path / "out")
    assert not [note for note in ledger.notes if "restored" in note]


async def a_copy_beside_a_live_one_ends(now: Running, name: str, folder: Path) -> None:
    true = now.daemons[name]
    frozen_copy(true, folder)
    goes_on(true)
    async with copied(now, name, folder) as copy:
        assert await copy.wait() == 1
        assert f"another {true.role} is running: host " in copy.log_tail()
        assert f"process {true.pid}" in copy.log_tail()
    refused = await found(now, lambda: logged(now, name, "rival_refused") or None)
    assert refused[0]["level"] == "warning"


async def a_coordinator_that_was_cut_off_ends_when_it_is_back(now: Running, folder: Path) -> None:
    true, link = now.daemons["coordinator"], now.links["coordinator"]
    link.cut()
    frozen_copy(true, folder)
    goes_on(true)
    async with copied(now, "coordinator", folder, bus=now.servers.user("coordinator", HUB)) as copy:
        await taken_over(now, copy)
        link.restore()
        assert await true.wait() == 1
        assert "another coordinator has taken over: host " in true.log_tail()
        await copy.stop()
        await puts_in_place_of(now, "coordinator", folder)
    await until(now, reached(version_now(now) + 1))


async def an_aggregator_that_stood_still_ends_when_it_goes_on(now: Running, folder: Path) -> None:
    true = now.daemons[REGION]
    frozen_copy(true, folder)
    async with copied(now, REGION, folder) as copy:
        await taken_over(now, copy)
        goes_on(true)
        assert await true.wait() == 1
        assert "another aggregator has taken over: host " in true.log_tail()
        await copy.stop()
        await puts_in_place_of(now, REGION, folder)


async def taken_over(now: Running, copy: DaemonProcess) -> None:
    def leases() -> bool | None:
        return '"event": "lease_taken"' in copy.log_file.read_text(encoding="utf-8") or None

    await found(now, leases)
