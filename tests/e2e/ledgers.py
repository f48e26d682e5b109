"""Check the ledgers of a run at the end of a test."""

import asyncio
import base64
import subprocess
import sys
from collections import Counter
from pathlib import Path

from fednats import subjects
from fednats.crypto.sealing import ModelKeys
from fednats.ledger.audit import audit
from fednats.ledger.records import LedgerRecord
from fednats.permissions import user_name
from fednats.storage.checkpoints import checkpoints_folder, frame_file, newest_checkpoint, weights_file
from fednats.storage.chunk_file import read_chunks
from fednats.subjects import HUB
from fednats.testbed.launch import Running
from fednats.transport.bus import Bus
from fednats.verify.books import Book
from fednats.verify.joined import Books, settled
from tests.support.connected_bus import until as happens

LIMIT_S = 60.0
_POLL_S = 0.5


async def balanced(output: Path) -> Books:
    """Wait until everything sent has been taken in; return the ledger and assert that it has no findings."""
    try:
        async with asyncio.timeout(LIMIT_S):
            while (ledger := await settled(output)).n_under_way and not ledger.findings:  # noqa: ASYNC110 - files have no event
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise AssertionError(f"still under way after {LIMIT_S} s: {ledger}") from None
    assert ledger.findings == []
    return ledger


async def figures(running: Running, node: str) -> dict[str, int]:
    """Return the figures of a node's consumers, summed: of updates at a region, of aggregates at the hub."""
    run, plan = running.servers.run, running.servers.plan
    if node == HUB:
        made = [subjects.inbox_stream(run, HUB, name) for name, region in plan.items() if region.parent is None]
    else:
        made = [subjects.updates_stream(run, node, site) for site in plan[node].sites]
    found: Counter[str] = Counter()
    async with Bus.connect(running.servers.observer(node), user_name("observer", node)) as bus:
        for stream in made:
            info = await bus._connection.api(f"CONSUMER.INFO.{stream}.{subjects.durable(node, stream)}")
            found.update({key: value for key, value in info.items() if type(value) is int})
    return found


async def all_settled(running: Running, node: str, copies: int = 1) -> None:
    """Wait until the bus has only evaluations left to deliver to ``node``, which wait for those of other sites.

    Each of them may have been sent up to ``copies`` times.
    """
    folder = "coordinator" if node == HUB else f"aggregator-{node}"

    async def settled() -> bool:
        info = await figures(running, node)
        book = await asyncio.to_thread(Book, node, running.output / folder / "journal.sqlite")
        waiting = sum(len(reported) for reported in book._collector.evaluations._tally._open.values())
        return bool(info["num_pending"] == 0 and waiting <= info["num_ack_pending"] <= copies * waiting)

    await happens(settled)


def audited(output: Path) -> dict[str, list[LedgerRecord]]:
    """Assert that ``fednats audit verify`` passes on every ledger of a run; return the records by folder."""
    ledgers = sorted(output.glob("**/*ledger.jsonl"))
    assert {file.parent.name for file in ledgers} == {
        *(folder.parent.name for folder in output.glob("*/daemon.log")),
    }
    for file in ledgers:
        verified = subprocess.run(
            [
                sys.executable,
                "-m",
                "fednats",
                "audit",
                "verify",
                file,
                "--signers",
                output / "kits" / "coordinator" / "signers.toml",
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        assert verified.returncode == 0, verified.stdout + verified.stderr
        assert "the chain is whole" in verified.stdout
    return {file.parent.name: audit(file).records for file in ledgers}


def assert_sealed(output: Path, run: str) -> None:
    """Assert that the servers hold sealed chunks of the newest model, and none of their content in the clear."""
    folder = checkpoints_folder(output / "coordinator")
    newest = newest_checkpoint(folder)
    keys = ModelKeys.read(output / "kits" / "coordinator" / "model-1.key", None, run)
    assert newest is not None
    stored = [file.read_bytes() for file in (output / "kits").glob("**/store/**/*") if file.is_file()]
    for frame in newest.frames:
        identity = frame.payload.payload_id
        for position, sealed in enumerate(read_chunks(frame_file(folder, identity))):
            plain = keys.opened(identity, position, sealed)
            assert any(sealed in data for data in stored), "the search finds what is there"
            assert not any(plain[len(plain) // 2 :][:32] in data for data in stored)
    weights = weights_file(folder, newest.version).read_bytes()
    assert not any(weights[-64:] in data for data in stored)


def assert_no_secret_is_logged(output: Path) -> None:
    """Assert that no log of a daemon or server has key material, in any form that a log might show."""
    kits = output / "kits"
    files = [file for file in kits.glob("*/*") if file.is_file() and file.suffix not in {".log", ".pid"}]
    private = [file for file in files if file.stat().st_mode & 0o077 == 0]
    secrets = {file: file.read_bytes() for file in private}
    kinds = {file.suffix or file.name for file in secrets}
    assert {".nk", ".secret", ".key", ".conf"} <= kinds, f"the search knows of {kinds}"
    logs = {file: file.read_bytes() for file in output.glob("**/*.log")}
    assert len(logs) == len(list(output.glob("*/daemon.log"))) + len(list(kits.glob("**/server.log")))
    for secret in secrets.values():
        part = secret[len(secret) // 3 :][:32]
        forms = (part, part.hex().encode(), base64.b64encode(part)[:40], repr(part)[2:-1].encode())
        for file, text in logs.items():
            assert not any(form in text for form in forms), file
