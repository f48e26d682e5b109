"""Sites learn what became of their updates: a copied site ends, one of another release stops training and says why."""

import asyncio
import os
import re
import shutil
import signal
from datetime import datetime
from pathlib import Path

from fednats.errors import CONFIG_EXIT
from fednats.ledger.anchor import read_anchor
from fednats.ledger.records import EGRESS_FILE
from fednats.protocol.refusals import FIRST_PAUSE_S
from fednats.testbed.launch import running
from fednats.testbed.processes import DaemonProcess
from fednats.verify.joined import APPLIED, settled
from tests.e2e.conftest import MakeFederation
from tests.e2e.faults import logged
from tests.e2e.until import LIMIT_S, end_after, reached, until

OTHER_RELEASE = "9.9.9"

_SITE_OF_ANOTHER_RELEASE = f"""
import fednats
fednats.__version__ = {OTHER_RELEASE!r}
from fednats import messages

class Update(messages.Update):
    novel: int = 1

messages.Update = Update
messages.AnyMessage = messages.AnyMessage | Update
"""


async def test_a_copied_site_ends_and_one_of_another_release_stops_training_and_says_why(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b", "new"]}, stop={"max_versions": 10_000})
    (tmp_path / "release").mkdir()
    (tmp_path / "release" / "sitecustomize.py").write_text(_SITE_OF_ANOTHER_RELEASE)
    async with running(federation, tmp_path / "out") as now:
        newer = now.daemons["site-new"]
        await until(now, lambda statuses: "site-new" in statuses)
        await stop_group(newer)  # while its worker loads the data
        newer.environment = {"PYTHONPATH": f"{tmp_path / 'release'}:{os.environ.get('PYTHONPATH', '')}"}
        await newer.start()
        statuses = await until(now, lambda all_: "site.new" in str(all_.get("coordinator", {}).get("declined")))
        version = statuses["coordinator"]["version"]
        await until(now, reached(version + 2))
        original = now.daemons["site-a"]
        await stop_group(original)
        state = original.settings.state_dir
        shutil.copytree(state, state.with_name("copy"))
        copy = DaemonProcess(
            "site", "copy", original.settings.model_copy(update={"state_dir": state.with_name("copy")})
        )
        try:
            await asyncio.gather(original.start(), copy.start())
            refused = await first_to_end(original, copy)
            assert refused.ended_with == CONFIG_EXIT, "no supervisor starts it again"
            assert "another process sends as a" in refused.log_tail()
            other = original if refused is copy else copy
            await refused.kill()  # it has ended; `kill` makes `check` ignore it
            version = (await until(now, reached(version + 3)))["coordinator"]["version"]
            await until(now, reached(version + 2))
            assert not other.ended
        finally:
            await copy.stop()
        if refused is original:
            shutil.rmtree(state)
            state.with_name("copy").rename(state)
            await original.start()
        await end_after(now, 1)
        ledger = await settled(tmp_path / "out")
    heard = logged(now, "site-new", "update_refused")
    paused = datetime.fromisoformat(heard[0]["timestamp"])
    trained = [datetime.fromisoformat(line["timestamp"]) - paused for line in logged(now, "site-new", "trained")]
    under_way = [after for after in trained if 0 < after.total_seconds() < FIRST_PAUSE_S]
    assert len(under_way) <= 1, "it trains on for nothing"
    assert heard[0]["reason"] == "malformed"
    assert f"sent by release {OTHER_RELEASE}" in heard[0]["detail"]
    anchor = read_anchor(tmp_path / "out" / "site-b" / EGRESS_FILE)
    assert anchor is not None
    assert anchor.head in (tmp_path / "out" / "site-b" / EGRESS_FILE).read_text()
    assert len(ledger.findings) == 1, "what this release cannot read, and nothing else"
    assert re.match(rf"unreadable: .* the outbox of new.*release {OTHER_RELEASE}", ledger.findings[0])
    assert ledger.accepted[APPLIED] > 0


async def stop_group(daemon: DaemonProcess) -> None:
    """Stop a daemon as systemd does, with a signal to its process group, and assert that it ends cleanly."""
    os.killpg(daemon.pid, signal.SIGTERM)
    assert await daemon.wait() == 0


async def first_to_end(*daemons: DaemonProcess) -> DaemonProcess:
    """Return the first of ``daemons`` that ends by itself."""
    async with asyncio.timeout(LIMIT_S):
        while not (ended := [daemon for daemon in daemons if daemon.ended]):  # noqa: ASYNC110 - whichever is first
            await asyncio.sleep(0.05)
    return ended[0]
