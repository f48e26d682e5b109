"""A site's service with its worker process, on a real bus: what it accepts, what it does, what it records."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import structlog
from structlog.testing import capture_logs

from fednats import subjects, wire
from fednats.codec.layout import Layout
from fednats.config import AggregationSettings, DeltaSettings, SiteSettings, TaskSettings, TrainingSettings
from fednats.crypto import sealing
from fednats.crypto.signers import read_roster
from fednats.delta.encode import encoder
from fednats.learning.entries import frozen_digests
from fednats.learning.flat import initial_model, parameters_of
from fednats.learning.task_code import make_task
from fednats.ledger.audit import audit
from fednats.ledger.records import EGRESS_FILE
from fednats.messages import (
    Control,
    Grid,
    Message,
    ModelManifest,
    Payload,
)
from fednats.provision.plan import RegionPlan
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.worker import Worker
from fednats.services.site.service import site
from fednats.storage.outbox import ChunkKey, Outbox, outbox_file
from fednats.subjects import HUB
from tests.makers import FIRST, update
from tests.support.connected_bus import ConnectedBus, connected_bus, until

RUN = "run"
PLAN = (RegionPlan("north", ("a", "b")), RegionPlan("south", ("c", "d")))
OF_A = subjects.head(subjects.update(RUN, "north", "a"))
MODEL = subjects.head(subjects.model(RUN))

LOG = structlog.get_logger()


@pytest_asyncio.fixture
async def bus(tmp_path: Path) -> AsyncIterator[ConnectedBus]:
    async with connected_bus(tmp_path, RUN, PLAN, leaves=False) as connected:
        yield connected


def signed(bus: ConnectedBus, role: str, node: str, subject: str, message: Message) -> bytes:
    return bus.servers.identity(role, node).sign(subject, message)


TASK = f"{Path(__file__).parents[1] / 'e2e' / 'normed'}:Normed"


def manifest(version: int) -> ModelManifest:
    """Return a manifest that fits the task's model, with frames that are not stored anywhere."""
    model = initial_model(make_task(TASK, {}), seed=0)
    layout = Layout(parameters_of(model))
    delta = DeltaSettings(cipher="none")
    return ModelManifest(
        run=RUN,
        opening=FIRST,
        version=version,
        task=TASK,
        seed=0,
        parameters=layout.parameters,
        weights_digest=bytes(16),
        frozen_digests=frozen_digests(model),
        frames=(),
        grid=Grid(grid_id="g0", steps=tuple(0.5 for _ in layout.parameters)),
        grid_ids=("g0",),
        key_id=encoder(delta, None).key_id,
        training=TrainingSettings(),
        aggregation=AggregationSettings(),
        delta=delta,
    )


@asynccontextmanager
async def a_site(bus: ConnectedBus, directory: Path) -> AsyncIterator[Daemon]:
    """Run site a's service, its worker process included."""
    np.savetxt(directory / "a.csv", np.random.default_rng(0).normal(size=(20, 31)) > 0, delimiter=",")
    (directory / "model.key").write_bytes(sealing.generate())
    settings = SiteSettings(
        run=RUN,
        site="a",
        region="north",
        state_dir=directory / "state",
        signers_file=bus.servers.signers_file("site", "a"),
        model_key_file=directory / "model.key",
        bus=bus.servers.site("north", "a"),
        task=TaskSettings(path=TASK, options={"csv": str(directory / "a.csv")}),
    )
    settings.state_dir.mkdir(exist_ok=True)
    daemon = Daemon("site", "a", RUN, LOG)
    running = asyncio.create_task(site(daemon, settings))
    try:
        async with asyncio.timeout(60):
            while not daemon.ready:  # noqa: ASYNC110 - it only sets a flag
                await asyncio.sleep(0.05)
        yield daemon
    finally:
        daemon.stopping.set()
        await asyncio.gather(running, return_exceptions=True)


async def refused(daemon: Daemon, reason: str, count: int) -> None:
    async def all_there() -> bool:
        return (daemon.metrics.registry.get_sample_value("fednats_refused_total", {"reason": reason}) or 0) >= count

    await until(all_there)
    assert daemon.metrics.registry.get_sample_value("fednats_refused_total", {"reason": reason}) == count


async def test_a_site_takes_models_and_control_of_the_coordinator_only(bus: ConnectedBus, tmp_path: Path) -> None:
    """A server's operator can put anything into the stream, here with the coordinator's user."""
    async with a_site(bus, tmp_path) as daemon:
        count = 0
        for role, node in (("aggregator", "north"), ("site", "b"), ("site", "a")):
            count += 1
            await bus.coordinator.publish(MODEL, signed(bus, role, node, MODEL, manifest(7)), f"forged-{count}")
            await refused(daemon, "signature", count)
        control = Control(run=RUN, opening=FIRST, status="closed", version=7, reason="forged")
        subject = subjects.control(RUN)
        await bus.coordinator.publish(subject, signed(bus, "aggregator", "north", subject, control), "control")
        await refused(daemon, "signature", count + 1)
        assert daemon.metrics.registry.get_sample_value("fednats_model_version") == 0.0
        assert daemon.status()["state"] == "waiting"
        await bus.coordinator.publish(MODEL, signed(bus, "coordinator", HUB, MODEL, manifest(3)), "v3")

        async def seen() -> bool:
            return daemon.metrics.registry.get_sample_value("fednats_model_version") == 3.0

        await until(seen)
        await bus.coordinator.publish(MODEL, signed(bus, "coordinator", HUB, MODEL, manifest(2)), "v2 again")
        await refused(daemon, "replayed", 1)
        others = manifest(4).frozen_digests[:-1] + b"\0"
        with capture_logs() as logs:
            other = manifest(4).model_copy(update={"frozen_digests": others})
            await bus.coordinator.publish(MODEL, signed(bus, "coordinator", HUB, MODEL, other), "v4")
            await refused(daemon, "wrong_shape", 1)
        (said,) = (log["detail"] for log in logs if log["event"] == "model_refused")
        assert said.startswith(
            "the frozen tensor 1.num_batches_tracked differs from the coordinator's: does model() load"
        )
        assert daemon.metrics.registry.get_sample_value("fednats_model_version") == 3.0
    ledger = audit(tmp_path / "state" / EGRESS_FILE, [read_roster(bus.servers.signers_file("site", "a"))])
    assert ledger.findings == []
    # it learned of a model, but was stopped before it could train
    assert [record.what for record in ledger.records] == ["started", "run", "other"]
    assert ledger.n_bytes["other"] == daemon.buses[0].sent[1] > 0
    assert daemon.metrics.registry.get_sample_value("fednats_ledger_records") == 3.0


async def test_the_end_of_a_run_is_heard_while_a_manifest_waits_for_the_pass_and_its_version_is_evaluated_all_the_same(
    bus: ConnectedBus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    under_way, ended = asyncio.Event(), asyncio.Event()

    async def busy(*_: object) -> None:
        under_way.set()
        await ended.wait()

    monkeypatch.setattr(Worker, "persist", busy)
    async with a_site(bus, tmp_path) as daemon:
        await bus.coordinator.publish(MODEL, signed(bus, "coordinator", HUB, MODEL, manifest(3)), "v3")
        async with asyncio.timeout(30):
            await under_way.wait()
        subject = subjects.control(RUN)
        control = Control(run=RUN, opening=FIRST, status="closed", version=3, reason="max_versions reached")
        await bus.coordinator.publish(subject, signed(bus, "coordinator", HUB, subject, control), "closed")

        async def closed() -> bool:
            return bool(daemon.status()["state"] == "closed")

        await until(closed)
        assert not ended.is_set()
        ended.set()

        async def is_evaluated() -> bool:  # as far as possible without its frames
            failed = daemon.metrics.registry.get_sample_value("fednats_failures_total", {"kind": "evaluate"})
            return failed == 1.0

        await until(is_evaluated)
        assert daemon.metrics.registry.get_sample_value("fednats_model_version") == 3.0


async def test_an_update_of_before_a_restart_is_on_record_with_the_epsilon_that_was_spent_on_it(
    bus: ConnectedBus, tmp_path: Path
) -> None:
    """The site sends it before it has seen any model, or knows whether the run adds noise."""
    chunk = b"two values"
    payload = Payload(payload_id="a-1", n_bytes=len(chunk), digests=(wire.digest(chunk),))
    (tmp_path / "state").mkdir()
    outbox = Outbox(outbox_file(tmp_path / "state"))
    outbox.add_chunk(ChunkKey("a-1", 1, 0, 0), chunk, np.zeros(2, np.int8), np.zeros(2, np.float32))
    outbox.add_update(update("a").model_copy(update={"payload": payload}), (1.0,), None, epsilon=2.5)
    outbox.close()
    async with a_site(bus, tmp_path):

        async def sent() -> bool:
            return await bus.aggregators["north"].last(subjects.updates_stream(RUN, "north", "a"), OF_A) is not None

        await until(sent)
    records = audit(tmp_path / "state" / EGRESS_FILE).records
    assert [record.epsilon for record in records if record.what == "update"] == [2.5]
