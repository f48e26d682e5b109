"""An encrypted sum with an outlying norm is left out, refused and reported, and a restart still knows that."""

from pathlib import Path

import numpy as np

from fednats import subjects, wire
from fednats.codec.layout import Layout
from fednats.delta.encode import encoder
from fednats.delta.sum import summer
from fednats.messages import ModelManifest, Payload
from fednats.permissions import user_name
from fednats.protocol.outliers import MIN_HISTORY
from fednats.services.daemon.identity import Identity
from fednats.testbed.launch import running
from fednats.transport.bus import Bus
from tests.e2e.conftest import MakeFederation
from tests.e2e.ledgers import balanced
from tests.e2e.test_bad_input import steady
from tests.e2e.until import end_after, reached, until
from tests.makers import aggregate


async def test_a_sum_that_stands_out_is_quarantined_and_a_restart_knows_it(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"]}, stop={"max_versions": 10_000})
    out = tmp_path / "out"
    async with running(federation, out) as federation_running:
        await until(federation_running, reached(MIN_HISTORY + 2))
        servers = federation_running.servers
        public_key = out / "kits" / "region-north" / "epoch-1.public"
        async with (
            Bus.connect(servers.site("north", "a"), user_name("site", "a")) as site,
            Bus.connect(servers.uplink("north"), user_name("uplink", "north")) as uplink,
        ):
            await send_poison(
                uplink, servers.identity("aggregator", "north"), await steady(site), public_key.read_bytes()
            )
        statuses = await until(federation_running, lambda statuses: "outlier" in statuses["coordinator"]["refusals"])
        (shown,) = statuses["coordinator"]["quarantined"]
        assert shown["aggregate_id"] == "poison"
        limit = statuses["coordinator"]["norm_limits"]["north"]
        assert shown["norm"] > limit["norm"]
        assert shown["version"] >= MIN_HISTORY
        coordinator = federation_running.daemons["coordinator"]
        await coordinator.kill()
        await coordinator.start()
        statuses = await until(federation_running, reached(statuses["coordinator"]["version"] + 2))
        assert statuses["coordinator"]["quarantined"] == [shown]
        assert statuses["coordinator"]["refusals"] == {"outlier": 1}
        assert statuses["coordinator"]["norm_limits"]["north"]["n"] >= limit["n"]
        statuses = await end_after(federation_running, 1)
        ledger = await balanced(out)
    assert any("quarantined: sum poison of north by hub" in note for note in ledger.notes)
    assert "sum_quarantined" in (out / "coordinator" / "daemon.log").read_text()
    # the honest sums passed; only the poisoned one was left out
    assert statuses["coordinator"]["accepted"] + 1 >= statuses["coordinator"]["version"]
    assert statuses["coordinator"]["best"]["metrics"]["auc"] > 0.9


async def send_poison(bus: Bus, identity: Identity, current: ModelManifest, public_key: bytes) -> None:
    """Send a well-formed sum in the region's name, with all values at the end of the grid."""
    layout = Layout(current.parameters)
    steps = layout.steps(current.grid.steps, 0, layout.n_parameters)
    nothing = np.zeros(layout.n_parameters, np.float32)
    encode = encoder(current.delta, public_key)
    encoded = encode.encode(-127 * steps, nothing, layout, current.grid, np.random.default_rng(0))
    add = summer(current.delta, public_key)
    chunks = [add.weighted_sum([chunk.data, chunk.data], (1, 1), 2) for chunk in encoded]
    prefix = subjects.aggregate("small", "north")
    await bus.publish_payload(prefix, "poison", chunks)
    digests = tuple(wire.digest(chunk) for chunk in chunks)
    head = aggregate("north", version=current.version).model_copy(
        update={
            "run": "small",
            "aggregate_id": "poison",
            "grid_id": current.grid.grid_id,
            "key_id": current.key_id,
            "total_weight": 2,
            "payload": Payload(payload_id="poison", n_bytes=sum(map(len, chunks)), digests=digests),
        }
    )
    await bus.publish(subjects.head(prefix), identity.sign(subjects.head(prefix), head), "poison")
