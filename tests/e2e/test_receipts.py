"""Sites hear what became of their updates: a copied site ends, one of another release stops training and says why."""

import asyncio
import os
import shutil
from pathlib import Path

from fednats.errors import CONFIG_EXIT
from fednats.privacy.anchor import read_anchor
from fednats.privacy.egress import EGRESS_FILE
from fednats.testbed.launch import running
from fednats.testbed.processes import DaemonProcess
from tests.e2e.conftest import MakeFederation
from tests.e2e.faults import logged
from tests.e2e.ledgers import balanced
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
        await newer.stop()
        newer.environment = {"PYTHONPATH": f"{tmp_path / 'release'}:{os.environ.get('PYTHONPATH', '')}"}
        await newer.start()
        statuses = await until(now, lambda all_: "site.new" in str(all_.get("coordinator", {}).get("declined")))
        version = statuses["coordinator"]["version"]
        await until(now, reached(version + 2))
        original = now.daemons["site-a"]
        await original.stop()
        state = original.settings.state_dir
        shutil.copytree(state, state.with_name("copy"))
        copy = DaemonProcess(
            "site", "copy", original.settings.model_copy(update={"state_dir": state.with_name("copy")})
        )
        try:
            await asyncio.gather(original.start(), copy.start())
            async with asyncio.timeout(LIMIT_S):
                ends = {asyncio.create_task(daemon.wait()): daemon for daemon in (original, copy)}
                (ended, *_), (going_on, *_) = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            refused, other = ends[ended], ends[going_on]
            going_on.cancel()
            assert ended.result() == CONFIG_EXIT, "no supervisor starts it again"
            assert "another process sends as a" in refused.log_tail()
            if refused is original:
                await original.kill()  # it has ended: nobody waits for it any more
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
        ledger = await balanced(tmp_path / "out")
    heard = logged(now, "site-new", "update_refused")
    assert 1 <= len(heard) <= 3, "it trains on for nothing"
    assert heard[0]["reason"] == "malformed"
    assert f"sent by release {OTHER_RELEASE}" in heard[0]["detail"]
    anchor = read_anchor(tmp_path / "out" / "site-b" / EGRESS_FILE)
    assert anchor is not None
    assert anchor.head in (tmp_path / "out" / "site-b" / EGRESS_FILE).read_text()
    assert ledger.findings == []
