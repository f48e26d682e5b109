"""A ciphertext ends the worker process: the daemon goes on, names the sender, and sums the other updates.

Readers of ciphertexts never let TenSEAL parse bytes of others, so no known bytes can do this. Here they are made
careless: the daemons start with a ``sitecustomize`` that lets TenSEAL parse, and add to an encryption of zero, anything
that has not the length of a ciphertext. Then the bytes in ``tests/killing.py`` end the process with SIGSEGV.
"""

import json
from pathlib import Path

import pytest
import tenseal as ts

from fednats import subjects, wire
from fednats.messages import Chunk, ModelManifest, Payload, Update
from fednats.permissions import user_name
from fednats.services.daemon.identity import Identity
from fednats.testbed.launch import running
from fednats.testbed.processes import DaemonProcess
from fednats.transport.bus import Bus
from tests.e2e.conftest import MakeFederation
from tests.e2e.faults import outbox
from tests.e2e.ledgers import balanced
from tests.e2e.test_bad_input import rejects, steady
from tests.e2e.until import ENDLESS, end_after, reached, until
from tests.killing import kills_when_added
from tests.makers import aggregate

CARELESS = '''
import importlib.util
import sys


class Careless:
    """Replaces the careful reader once its module is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != "fednats.crypto.ciphertext":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            careful = module.CiphertextFormat.read

            def read(self, data):
                if len(data) == self.ciphertext_bytes:
                    return careful(self, data)
                zero = module.ts.bfv_vector(self._context, [0] * self.n_slots)
                return zero + module.ts.bfv_vector_from(self._context, data)

            module.CiphertextFormat.read = read

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, Careless())
'''


async def test_a_ciphertext_that_kills_the_worker_is_refused_by_name_and_the_others_are_summed(
    make_federation: MakeFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "careless"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(CARELESS)
    monkeypatch.setattr(DaemonProcess, "environment", {"PYTHONPATH": f"{folder}:{Path(__file__).parents[2]}"})
    federation = make_federation({"north": ["a", "b", "c"]}, stop=ENDLESS)
    async with running(federation, tmp_path / "out") as federation_running:
        servers = federation_running.servers
        async with Bus.connect(servers.site("north", "c"), user_name("site", "c")) as bus:
            current = await steady(bus)
            ((newest,),) = outbox(federation_running, "c", "SELECT MAX(sequence) FROM outgoing")
            killing = kills_when_added(context(tmp_path))
            await send_update(bus, servers.identity("site", "c"), current, killing, newest + 500)
        await until(federation_running, lambda statuses: "ciphertext" in statuses["aggregator-north"]["refusals"])
        async with Bus.connect(servers.uplink("north"), user_name("uplink", "north")) as bus:
            await send_sum(bus, servers.identity("aggregator", "north"), current, kills_when_added(context(tmp_path)))
        before = await until(federation_running, lambda statuses: "ciphertext" in statuses["coordinator"]["refusals"])
        await until(federation_running, reached(before["coordinator"]["version"] + 3))
        observer = servers.observer("north")
        async with Bus.connect(observer, user_name("observer", "north")) as bus:
            (reject,) = await rejects(bus, 1)
        assert (reject.sender, reject.reason) == ("c", "ciphertext")
        assert "the worker process ended" in reject.detail
        for name in ("aggregator-north", "coordinator"):
            assert not federation_running.daemons[name].ended
            assert n_starts(tmp_path / "out" / name / "daemon.log") == 1
        statuses = await end_after(federation_running, 2)
        ledger = await balanced(tmp_path / "out")
    refused = {name: statuses[name]["refusals"]["ciphertext"] for name in ("aggregator-north", "coordinator")}
    assert refused == {"aggregator-north": 1, "coordinator": 1}, "nothing honest"
    (note,) = ledger.notes
    assert "update killing came in the name of c" in note


def n_starts(log: Path) -> int:
    return sum(json.loads(line).get("event") == "started" for line in log.read_text().splitlines() if line[0] == "{")


def context(tmp_path: Path) -> ts.Context:
    return ts.context_from((tmp_path / "out" / "kits" / "coordinator" / "epoch-1.public").read_bytes(), n_threads=1)


async def send_update(bus: Bus, identity: Identity, current: ModelManifest, ciphertext: bytes, sequence: int) -> None:
    prefix = subjects.update("small", "north", "c")
    chunk = wire.pack(Chunk(parts=(ciphertext,)))
    await bus.publish_payload(prefix, "killing", [chunk])
    head = Update(
        run="small",
        region="north",
        site="c",
        update_id="killing",
        sequence=sequence,  # a number that the site has not used
        base_version=current.version,
        grid_id=current.grid.grid_id,
        key_id=current.key_id,
        n_samples=50,
        saturated=0,
        min_sites=2,
        payload=Payload(payload_id="killing", n_bytes=len(chunk), digests=(wire.digest(chunk),)),
    )
    await bus.publish(subjects.head(prefix), identity.sign(subjects.head(prefix), head), "killing")


async def send_sum(bus: Bus, identity: Identity, current: ModelManifest, ciphertext: bytes) -> None:
    prefix = subjects.aggregate("small", "north")
    chunk = wire.pack(Chunk(parts=(ciphertext,)))
    await bus.publish_payload(prefix, "killing", [chunk])
    head = aggregate("north", version=current.version).model_copy(
        update={
            "run": "small",
            "aggregate_id": "killing",
            "grid_id": current.grid.grid_id,
            "key_id": current.key_id,
            "total_weight": 10,
            "payload": Payload(payload_id="killing", n_bytes=len(chunk), digests=(wire.digest(chunk),)),
        }
    )
    await bus.publish(subjects.head(prefix), identity.sign(subjects.head(prefix), head), "killing")
