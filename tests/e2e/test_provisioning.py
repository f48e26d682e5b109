"""Kits in use: the command line, a hospital revoked during a run, a new epoch of encryption."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import tomli_w

from fednats import subjects, wire
from fednats.config import AggregatorSettings, DaemonSettings, SiteSettings
from fednats.crypto.signing import unsigned
from fednats.learning.code_files import read_code
from fednats.messages import ModelManifest
from fednats.permissions import user_name
from fednats.privacy.policy import Policy
from fednats.provision.kits import provision, provisioned, rotate
from fednats.provision.plan import Kits
from fednats.testbed.launch import COORDINATOR, Running, running
from fednats.testbed.processes import DaemonProcess
from fednats.transport.bus import Bus
from fednats.verify.joined import APPLIED
from tests.e2e.conftest import NORMED, MakeFederation
from tests.e2e.ledgers import balanced
from tests.e2e.until import Statuses, closed, end_after, reached, until, version_now
from tests.support.connected_bus import until as answered

LIMIT_S = 60


def fednats(*arguments: str, cwd: Path, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "fednats", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


def test_the_command_line_provisions_adds_revokes_and_rotates(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation({"north": ["a", "b", "c"]})
    file = tmp_path / "federation.toml"
    file.write_text(tomli_w.dumps(federation.model_dump(mode="json", exclude_none=True)))
    own = fednats("keys", "new", "site.a", "--out", "own", cwd=tmp_path).strip()
    assert "own/epoch-1.secret" in fednats("keys", "new-he", "federation.toml", "--out", "own", cwd=tmp_path)
    handed_in = ("--public-key", own, "--he-public", "own/epoch-1.public")
    made = fednats("provision", "federation.toml", "--out", "kits", *handed_in, cwd=tmp_path)
    assert ".secret" not in made
    assert "site-b/site.b.nk" in made
    assert "site-a/site.a.nk" not in made
    assert "hand out from kits: coordinator, hub, region-north, site-a, site-b, site-c" in made
    assert "nothing changed" in fednats("provision", "federation.toml", "--out", "kits", cwd=tmp_path)
    raw = federation.model_dump(mode="json", exclude_none=True)
    raw["sites"]["d"] = raw["sites"]["a"]
    file.write_text(tomli_w.dumps(raw))
    refused = fednats("provision", "federation.toml", "--out", "kits", cwd=tmp_path, code=1)
    assert "give --add-site d" in refused
    assert "site-d/site.d.nk" in fednats(
        "provision", "federation.toml", "--out", "kits", "--add-site", "d", cwd=tmp_path
    )
    revoked = fednats("provision", "federation.toml", "--out", "kits", "--revoke", "site.b", cwd=tmp_path)
    assert "region-north/accounts.conf" in revoked
    assert "--epoch 2" in fednats("keys", "rotate", "--out", "kits", cwd=tmp_path, code=1)
    fednats("keys", "new-he", "federation.toml", "--epoch", "2", "--out", "own", cwd=tmp_path)
    rotated = fednats("keys", "rotate", "--out", "kits", "--he-public", "own/epoch-2.public", cwd=tmp_path)
    assert "coordinator/epoch-2.public" in rotated
    assert not list((tmp_path / "kits").rglob("*.secret"))


async def test_a_daemon_starts_from_its_kit_in_any_folder(make_federation: MakeFederation, tmp_path: Path) -> None:
    allowed = read_code(NORMED).sha256
    federation = make_federation({"north": ["a", "b"]}, task=f"{NORMED}/:Normed", stop={"max_versions": 100})
    policy = Policy(task_sha256=(allowed,))
    sites = {name: site.model_copy(update={"policy": policy}) for name, site in federation.sites.items()}
    federation = federation.model_copy(update={"sites": sites})
    async with running(federation, tmp_path / "out") as now:
        await until(now, reached(1))
        await now.daemons["site-a"].stop()
        kit = Kits(tmp_path / "out" / "kits").site("a")
        (kit / "state").mkdir(mode=0o755)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "fednats", "site", "--config", str(kit / "site.toml"),
            cwd="/",
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "FEDNATS_WEB__PORT": "0"},
        )  # fmt: skip
        try:
            await sends(kit / "state" / "outbox.sqlite")
            second = await asyncio.to_thread(fednats, "site", "--config", str(kit / "site.toml"), cwd=tmp_path, code=78)
            assert f"a daemon runs on {kit / 'state'} already" in second
            written = [*(kit / "state").rglob("*"), *kit.glob("*.sqlite")]
            assert written
            assert not [path for path in written if path.stat().st_mode & 0o077]
            assert (kit / "state").stat().st_mode & 0o777 == 0o755, "a folder that it did not make was changed"
        finally:
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
        assert read_code(kit / "normed").files == read_code(NORMED).files
        (kit / "normed" / "network.py").write_text("raise SystemExit\n")
        refused = await asyncio.to_thread(fednats, "site", "--config", str(kit / "site.toml"), cwd=tmp_path, code=78)
        assert f"{kit / 'normed'} has SHA-256 {read_code(kit / 'normed').sha256}" in refused
        assert f"task_sha256 in policy.toml allows {allowed}; put the code back" in refused


async def sends(outbox: Path) -> None:
    """Wait until a site has sent an update."""

    def sent() -> bool:
        if not outbox.exists():
            return False
        with sqlite3.connect(f"file:{outbox}?mode=ro", uri=True) as connection:
            try:
                return bool(connection.execute("SELECT 1 FROM outgoing WHERE sent_at IS NOT NULL").fetchone())
            except sqlite3.OperationalError:
                return False

    async with asyncio.timeout(LIMIT_S):
        while not await asyncio.to_thread(sent):  # noqa: ASYNC110 -- another process writes
            await asyncio.sleep(0.1)


async def test_who_is_revoked_is_cut_off_at_once_and_the_others_go_on(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b", "c"]}, stop={"max_versions": 1000})
    async with running(federation, tmp_path / "out") as now:
        await until(now, reached(2))
        kits = now.servers.kits
        await asyncio.to_thread(provision, provisioned(kits), kits.root, revoke=["site.c"])
        await now.servers.leaves["north"].reload()

        def is_out(statuses: Statuses) -> bool:
            return statuses.get("site-c", {}).get("ready") is False

        statuses = await until(now, is_out)
        await until(now, reached(int(statuses["coordinator"]["version"]) + 3))
        assert "authorization" in now.daemons["site-c"].log_file.read_text().casefold()
        await now.daemons["site-c"].kill()
        await end_after(now, 2)


async def test_a_new_epoch_begins_while_the_old_one_drains(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, stop={"max_versions": 1000})
    async with running(federation, tmp_path / "out") as now:
        await until(now, reached(2))
        before = await announced(now)
        await asyncio.to_thread(rotate, now.servers.kits.root)
        for daemon in sorted(now.daemons, key=lambda daemon: daemon.name == COORDINATOR):  # the coordinator is last
            await renewed(now, daemon)
        await until(now, reached(await asyncio.to_thread(version_now, now) + 6))
        after = await announced(now)
        statuses = await end_after(now, 2)
        ledger = await balanced(tmp_path / "out")
    assert after.key_id != before.key_id
    assert after.older_key_ids == (before.key_id,)
    for name in ("coordinator", "aggregator-north", "aggregator-south"):
        assert statuses[name]["refusals"] == {}, name
    assert not [fate for fate in ledger.updates if fate.startswith("refused")]
    assert ledger.accepted[APPLIED] >= 8
    assert closed(statuses)


async def renewed(now: Running, daemon: DaemonProcess) -> None:
    """Restart a daemon with the keys in its kit."""
    if isinstance(daemon.settings, SiteSettings):
        kit: DaemonSettings = now.servers.site_settings(daemon.settings.site)
    elif isinstance(daemon.settings, AggregatorSettings):
        kit = now.servers.aggregator_settings(daemon.settings.region)
    else:
        kit = now.servers.coordinator_settings()
    keys = {
        key: getattr(kit, key)
        for key in type(kit).model_fields
        if key.endswith(("public_key_file", "secret_key_file", "model_key_file"))
    }
    assert all(path is not None and path.exists() for path in keys.values())
    await daemon.stop()
    daemon.settings = daemon.settings.model_copy(update=keys)
    await daemon.start()


async def announced(now: Running) -> ModelManifest:
    """Return the newest manifest, as a site reads it."""
    settings = now.servers.site("north", "a")
    async with Bus.connect(settings, user_name("site", "a")) as bus:
        stream = subjects.models_stream(now.servers.run, "north")
        record = await answered(lambda: bus.last(stream, subjects.head(subjects.model(now.servers.run))))
    assert record is not None
    return wire.unpack(unsigned(record.data), ModelManifest)
