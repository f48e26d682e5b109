"""The supervisor under ``fednats run``: growing pauses, and an end where starting again is of no use."""

import asyncio
from pathlib import Path

import pytest

from fednats.errors import CONFIG_EXIT
from fednats.testbed import supervisor
from fednats.testbed.processes import DaemonDiedError
from fednats.testbed.supervisor import MAX_DEATHS, Supervisor


class Process:
    """A real process that ends at once."""

    def __init__(self, folder: Path, code: int) -> None:
        self.label = "site a"
        self.log_file = folder / "daemon.log"
        self.log_file.write_text("why it ended\n")
        self.starts_s: list[float] = []
        self._code = code
        self._process: asyncio.subprocess.Process | None = None

    @property
    def ended_with(self) -> int | None:
        return None if self._process is None else self._process.returncode

    async def start(self) -> None:
        self.starts_s.append(asyncio.get_running_loop().time())
        self._process = await asyncio.create_subprocess_exec("sh", "-c", f"exit {self._code}")
        await self._process.wait()


async def mended(process: Process) -> Supervisor:
    await process.start()
    watching = Supervisor([process])
    while True:
        await watching.mend()
        await asyncio.sleep(0.001)


async def test_what_dies_again_and_again_is_started_with_growing_pauses_and_then_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.01)
    process = Process(tmp_path, 1)
    with pytest.raises(
        DaemonDiedError, match=r"(?s)site a ended 6 times in a row.*daemon\.log ends with:\nwhy it ended"
    ):
        await mended(process)
    assert len(process.starts_s) == 1 + MAX_DEATHS
    pauses = [after - before for before, after in zip(process.starts_s[1:], process.starts_s[2:], strict=False)]
    assert all(pause > 0.01 * 2 ** (number + 1) for number, pause in enumerate(pauses))


async def test_what_ends_by_its_settings_is_not_started_again(tmp_path: Path) -> None:
    process = Process(tmp_path, CONFIG_EXIT)
    with pytest.raises(DaemonDiedError, match="site a ended by an error that starting it again does not mend"):
        await mended(process)
    assert len(process.starts_s) == 1


async def test_what_has_lived_long_may_die_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "FIRST_PAUSE_S", 0.0)
    monkeypatch.setattr(supervisor, "SOUND_S", 0.0)
    process = Process(tmp_path, 1)
    watching = Supervisor([process])
    await process.start()
    while watching.restarts["site a"] < 2 * MAX_DEATHS:
        await watching.mend()
        await asyncio.sleep(0.001)
