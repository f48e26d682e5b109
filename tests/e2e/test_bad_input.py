"""Bad input of every kind into a running federation: refused with its reason, counted, and the others go on."""

import struct
from pathlib import Path

from fednats import subjects, wire
from fednats.messages import Chunk, Evaluation, Message, ModelManifest, Payload, Update
from fednats.permissions import user_name
from fednats.testbed.launch import running
from fednats.transport.bus import Bus
from tests.e2e.conftest import OWN_TASK, MakeFederation
from tests.e2e.until import Statuses, closed, reached, until

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
    federation = make_federation({"north": ["a", "b", "nan", "other"]}, stop={"max_versions": 40})
    sites = dict(federation.sites)
    for name, trouble in (("nan", "not a number"), ("other", "another model")):
        options = {**sites[name].options, "trouble": trouble}
        sites[name] = sites[name].model_copy(update={"options": options})
    federation = federation.model_copy(update={"task": f"{tmp_path / 'troubled.py'}:Troubled", "sites": sites})
    async with running(federation, tmp_path / "out") as federation_running:
        await until(federation_running, reached(1))
        settings = federation_running.servers.site("north", "nan")
        async with Bus.connect(settings, user_name("site", "nan")) as bus:
            await send_bad_updates(bus, await manifest(bus))
        await until(federation_running, refused_at_least_once)
        statuses = await until(federation_running, closed)
    assert statuses["coordinator"]["version"] == 40
    assert statuses["coordinator"]["refusals"] == {}
    assert {"a", "b"} == {name.removeprefix("site-") for name, s in statuses.items() if s.get("updates")}
    assert "wrong_shape" in (tmp_path / "out" / "site-other" / "daemon.log").read_text()
    log = (tmp_path / "out" / "site-nan" / "daemon.log").read_text()
    assert "job_failed" in log
    assert "not finite" in log or "loss is nan" in log


EXPECTED = {
    "malformed",
    "oversized",
    "wrong_run",
    "wrong_sender",
    "wrong_grid",
    "wrong_key",
    "wrong_shape",
    "checksum",
    "ciphertext",
}


def refused_at_least_once(statuses: Statuses) -> bool:
    refusals = statuses.get("aggregator-north", {}).get("refusals", {})
    return set(refusals) >= EXPECTED


async def manifest(bus: Bus) -> ModelManifest:
    record = await bus.last(subjects.models_stream("small", "north"), subjects.head(subjects.model("small")))
    assert record is not None
    return wire.unpack(record.data, ModelManifest)


async def send_bad_updates(bus: Bus, current: ModelManifest) -> None:
    prefix = subjects.update("small", "north", "nan")
    chunk = wire.pack(Chunk(parts=(b"no ciphertext",)))

    def head(identity: str, **changes: object) -> Update:
        fields = {
            "run": "small",
            "region": "north",
            "site": "nan",
            "update_id": identity,
            "sequence": 1,
            "base_version": current.version,
            "grid_id": current.grid.grid_id,
            "key_id": current.key_id,
            "n_samples": 50,
            "saturated": 0,
            "payload": Payload(payload_id=identity, n_bytes=len(chunk), digests=(wire.digest(chunk),)),
        }
        return Update.model_validate({**fields, **changes})

    async def announce(identity: str, message: Message | bytes) -> None:
        data = message if isinstance(message, bytes) else wire.pack(message)
        await bus.publish(subjects.head(prefix), data, identity)

    await announce("garbage", b"garbage")
    await announce("truncated", wire.pack(head("truncated"))[:-3])
    await announce("kind", Evaluation(run="small", region="north", site="nan", version=0, n_samples=1, metrics={}))
    await announce("oversized", struct.pack(">2sBBI", b"FN", wire.SCHEMA_VERSION, 1, 2**31))
    await announce("odd-id", wire.pack(head("odd").model_copy(update={"update_id": "a b"})))
    await announce("huge", wire.pack(head("huge").model_copy(update={"n_samples": 2**63})))
    await announce("run", head("run", run="other"))
    await announce("sender", head("sender", site="a"))
    await announce("grid", head("grid", grid_id="unheard", base_version=0))
    await announce("key", head("key", key_id="other"))
    await announce("shape", head("shape", payload=Payload(payload_id="shape", n_bytes=0, digests=())))
    await announce("absent", head("absent"))  # its chunk is never sent
    await bus.publish_payload(prefix, "noise", [chunk])
    await announce("noise", head("noise"))


async def test_a_daemon_that_cannot_start_says_why(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation({"north": ["a", "b"]})
    (tmp_path / "a.csv").unlink()
    async with running(federation, tmp_path / "out") as federation_running:
        code = await federation_running.daemons["site-a"].wait()
        log = (tmp_path / "out" / "site-a" / "daemon.log").read_text()
    assert code == 1
    assert "a.csv" in log
    assert '"stopped_by_error"' in log
