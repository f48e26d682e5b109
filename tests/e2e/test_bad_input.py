"""Bad input of every kind to a running federation is refused with a reason and counted, and the run goes on."""

import asyncio
import base64
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from fednats import subjects, wire
from fednats.config import BusSettings
from fednats.crypto.signing import unsigned
from fednats.errors import CONFIG_EXIT
from fednats.messages import Chunk, Message, ModelManifest, Payload, Reject, Update
from fednats.permissions import user_name
from fednats.protocol.events import evaluation_id
from fednats.services.daemon.identity import Identity
from fednats.testbed.launch import running
from fednats.transport.bus import Bus
from tests.e2e.conftest import OWN_TASK, MakeFederation
from tests.e2e.ledgers import all_settled, balanced
from tests.e2e.until import Statuses, end_after, reached, until
from tests.makers import evaluation
from tests.support.connected_bus import until as happens

BUS_README = Path(__file__).parents[2] / "bus" / "README.md"

TASK = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("own_task", {str(OWN_TASK)!r})
own_task = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own_task)
from torch import nn

class Troubled(own_task.MyTask):
    def __init__(self, csv="", trouble=""):
        super().__init__(csv)
        self.trouble = trouble

    def model(self):
        return nn.Linear(30, 2) if self.trouble == "another model" else super().model()

    def loss(self, model, inputs, targets):
        loss = super().loss(model, inputs, targets)
        return loss * float("nan") if self.trouble == "not a number" else loss
"""


async def test_bad_input_is_refused_and_the_run_goes_on(make_federation: MakeFederation, tmp_path: Path) -> None:
    (tmp_path / "troubled.py").write_text(TASK)
    federation = make_federation({"north": ["a", "b", "nan", "other"]}, stop={"max_versions": 10_000})
    sites = dict(federation.sites)
    for name, trouble in (("nan", "not a number"), ("other", "another model")):
        options = {**sites[name].options, "trouble": trouble}
        sites[name] = sites[name].model_copy(update={"options": options})
    federation = federation.model_copy(update={"task": f"{tmp_path / 'troubled.py'}:Troubled", "sites": sites})
    async with running(federation, tmp_path / "out") as federation_running:
        settings = federation_running.servers.site("north", "nan")
        async with Bus.connect(settings, user_name("site", "nan")) as bus:
            current = await steady(bus)
            await claim_ids(bus, range(current.version, 61))
            sent = await send_bad_updates(bus, federation_running.servers.identity("site", "nan"), current)
        statuses = await until(federation_running, refused(EXPECTED))
        observer = federation_running.servers.observer("north")
        async with Bus.connect(observer, user_name("observer", "north")) as bus:
            kept = await rejects(bus, len(sent))
            assert {reject.data: (reject.reason, reject.sender, reject.subject) for reject in kept} == {
                data: (reason, "nan", HEAD) for data, reason in sent.items()
            }
            assert await as_the_document_says(observer, "malformed", tmp_path) in {str(reject) for reject in kept}
            # after two more versions all refusals are done, and no bad input is still under way
            await until(federation_running, reached(statuses["coordinator"]["version"] + 2))
            aggregator = federation_running.daemons["aggregator-north"]
            await aggregator.kill()
            await aggregator.start()
            await until(federation_running, reached(statuses["coordinator"]["version"] + 5))
            again = (await until(federation_running, refused(JOURNALLED)))["aggregator-north"]["refusals"]
            assert again.keys() & (EXPECTED - JOURNALLED) == set(), "what was refused came again"
            await until(federation_running, evaluated(current.version + 5))  # the evaluations of others are not lost
            statuses = await end_after(federation_running, 1)
            ledger = await balanced(tmp_path / "out")
            assert len(await rejects(bus, len(sent))) == len(sent)
            await all_settled(federation_running, "north")
    assert len(ledger.notes) == len(JOURNALLED)
    assert all("in the name of nan" in note for note in ledger.notes)
    assert statuses["coordinator"]["refusals"] == {}
    assert {"a", "b"} == {name.removeprefix("site-") for name, s in statuses.items() if s.get("updates")}
    nan = (tmp_path / "out" / "site-nan" / "daemon.log").read_text()
    assert {reason for reason in EXPECTED if f'"reason": "{reason}"' in nan and "refused_in_our_name" in nan}
    assert '"update_refused"' not in nan, "what others send in its name does not stop a site"
    assert "wrong_shape" in (tmp_path / "out" / "site-other" / "daemon.log").read_text()
    log = (tmp_path / "out" / "site-nan" / "daemon.log").read_text()
    assert "job_failed" in log
    assert "not finite" in log or "loss is nan" in log


def evaluated(version: int) -> Callable[[Statuses], bool]:
    """Return a check that a version after ``version`` has been evaluated."""
    return lambda statuses: any(
        entry["version"] > version for entry in statuses.get("coordinator", {}).get("history", [])
    )


JOURNALLED = {"replayed", "wrong_grid", "wrong_key", "wrong_shape", "checksum", "ciphertext"}
"""Reasons to refuse a message that could be read; these refusals are journalled."""

EXPECTED = {"signature", "malformed", "oversized", "wrong_run", "wrong_sender"} | JOURNALLED

HEAD = subjects.head(subjects.update("small", "north", "nan"))


def refused(reasons: set[str]) -> Callable[[Statuses], bool]:
    return lambda statuses: set(statuses.get("aggregator-north", {}).get("refusals", {})) >= reasons


async def rejects(bus: Bus, count: int) -> list[Reject]:
    """Wait for ``count`` rejects of the region and return all, read with its operator's key."""
    stream = subjects.rejects_stream("small", "north")

    async def all_there() -> bool:
        return bool((await bus._connection.api(f"STREAM.INFO.{stream}"))["state"]["messages"] >= count)

    await happens(all_there)
    state = (await bus._connection.api(f"STREAM.INFO.{stream}"))["state"]
    found = []
    for sequence in range(state["first_seq"], state["last_seq"] + 1):
        answer = await bus._connection.api(f"STREAM.MSG.GET.{stream}", {"seq": sequence})
        reject = wire.unpack(base64.b64decode(answer["message"]["data"]), Reject)
        assert answer["message"]["subject"] == subjects.reject("small", "north", reject.sender, reject.reason)
        found.append(reject)
    return found


async def as_the_document_says(observer: BusSettings, reason: str, folder: Path) -> str:
    """Run the example in bus/README.md that reads the newest reject of a kind; return its last line of output."""
    (code,) = re.findall(r"```python\n(.*?)```", BUS_README.read_text(encoding="utf-8"), re.DOTALL)
    for documented, actual in (
        ('"tls://127.0.0.1:4223"', repr(observer.url)),
        ('"observer.north.nk"', repr(str(observer.nkey_seed_file))),
        ('"ca.pem"', repr(str(observer.ca_file))),
        ('"RUN"', '"small"'),
        ('"SITE"', '"nan"'),
        ('"signature"', repr(reason)),
    ):
        assert documented in code
        code = code.replace(documented, actual)
    (folder / "example.py").write_text(code)
    process = await asyncio.create_subprocess_exec(sys.executable, folder / "example.py", stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    return output.decode().splitlines()[-1]


async def steady(bus: Bus) -> ModelManifest:
    """Return the manifest of the first version with the same grid as the three versions before it.

    The grid changes in the first versions, and an update on an old grid waits for others without being read.
    """
    grids: dict[int, str] = {}
    stream, head = subjects.models_stream("small", "north"), subjects.head(subjects.model("small"))
    async with asyncio.timeout(120):
        async for record in bus.follow(stream, [head]):
            manifest = wire.unpack(unsigned(record.data), ModelManifest)
            grids[manifest.version] = manifest.grid.grid_id
            recent = {version: grid for version, grid in grids.items() if version >= manifest.version - 3}
            if manifest.version - min(recent) == 3 and set(recent.values()) == {manifest.grid.grid_id}:
                return manifest
    raise AssertionError("it follows for ever")


async def send_bad_updates(bus: Bus, identity: Identity, current: ModelManifest) -> dict[bytes, str]:
    """Send a bad update of each kind; return the messages, each with the reason for which it must be refused."""
    prefix = subjects.update("small", "north", "nan")
    chunk = wire.pack(Chunk(parts=(b"no ciphertext",)))
    sent: dict[bytes, str] = {}

    def head(update_id: str, **changes: object) -> Update:
        fields = {
            "run": "small",
            "region": "north",
            "site": "nan",
            "update_id": update_id,
            "sequence": len(sent) + 1,
            "base_version": current.version,
            "grid_id": current.grid.grid_id,
            "key_id": current.key_id,
            "n_samples": 50,
            "saturated": 0,
            "min_sites": 2,
            "payload": Payload(payload_id=update_id, n_bytes=len(chunk), digests=(wire.digest(chunk),)),
        }
        return Update.model_validate({**fields, **changes})

    async def announce(message_id: str, reason: str, message: Message | bytes) -> None:
        packed = message if isinstance(message, bytes) else wire.pack(message)
        await offer(message_id, reason, identity.signer.sign(HEAD, packed))

    async def offer(message_id: str, reason: str, data: bytes) -> None:
        await bus.publish(HEAD, data, message_id)
        sent[data] = reason

    await offer("unsigned", "signature", wire.pack(head("unsigned")))
    await announce("garbage", "malformed", b"garbage")
    await announce("truncated", "malformed", wire.pack(head("truncated"))[:-3])
    await announce("kind", "malformed", evaluation("nan"))
    await announce("oversized", "oversized", struct.pack(">2sBBI", b"FN", wire.SCHEMA_VERSION, 1, 2**31))
    await announce("odd-id", "malformed", head("odd").model_copy(update={"update_id": "a b"}))
    await announce("huge", "malformed", head("huge").model_copy(update={"n_samples": 2**63}))
    await announce("run", "wrong_run", head("run", run="other"))
    await announce("sender", "wrong_sender", head("sender", site="a"))
    await announce("grid", "wrong_grid", head("grid", grid_id="unheard", base_version=0))
    await announce("key", "wrong_key", head("key", key_id="other"))
    await announce("shape", "wrong_shape", head("shape", payload=Payload(payload_id="shape", n_bytes=0, digests=())))
    await announce("absent", "checksum", head("absent"))  # without its chunk
    await announce("twice", "replayed", head("twice", sequence=len(sent)))  # the same number as the message before
    await bus.publish_payload(prefix, "noise", [chunk])
    await announce("noise", "ciphertext", head("noise"))
    return sent


async def claim_ids(bus: Bus, versions: range) -> None:
    """Store messages under the ids that would make the stream drop other sites' evaluations as duplicates."""
    for version in versions:
        for site in ("a", "b"):
            guess = evaluation_id(evaluation(site, version))
            for message_id in (guess, f"{wire.digest(guess.encode()).hex()}.0"):
                await bus.publish(
                    subjects.chunk(subjects.update("small", "north", "nan"), "x", version), b"", message_id
                )


async def test_a_daemon_that_cannot_start_says_why(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation({"north": ["a", "b"]})
    (tmp_path / "a.csv").unlink()
    async with running(federation, tmp_path / "out") as federation_running:
        code = await federation_running.daemons["site-a"].wait()
        log = (tmp_path / "out" / "site-a" / "daemon.log").read_text()
    assert code in {1, CONFIG_EXIT}
    assert "a.csv" in log
    assert '"stopped_by_error"' in log
