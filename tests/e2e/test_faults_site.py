"""Sites are killed or cut off: nothing is lost, and nothing counts twice."""

import re
from pathlib import Path
from typing import Any

from fednats import wire
from fednats.config import DeltaSettings
from fednats.messages import Update
from fednats.protocol.events import ContributionArrived
from fednats.storage.local_model import model_folder
from fednats.testbed.launch import Running, running
from fednats.testbed.wan import WanSettings
from fednats.verify.joined import APPLIED
from tests.e2e.conftest import MakeFederation
from tests.e2e.faults import events, found, in_state, logged, outbox, outbox_of, wide
from tests.e2e.ledgers import audited, balanced
from tests.e2e.until import closed, reached, until

PAIR = {"north": ["a", "b"]}
"""A sum needs updates of two sites, so neither site gets further without the other."""

UNSENT = "SELECT update_id FROM outgoing WHERE sent_at IS NULL AND dropped_at IS NULL ORDER BY sequence"
LONG_PASS = {"local_steps": 1500, "batch_size": 16, "learning_rate": 0.001}


async def test_a_site_killed_in_training_trains_again_and_between_outbox_and_bus_sends_afterwards(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(PAIR, training=LONG_PASS, stop={"max_versions": 3})
    async with running(federation, tmp_path / "out", {"site-a": WanSettings()}) as now:
        await until(now, reached(1))
        statuses = await until(now, in_state("site-a", "training"))
        await now.daemons["site-a"].kill()
        version = statuses["site-a"]["version"]
        made_on = f"SELECT 1 FROM outgoing WHERE base_version = {version}"  # noqa: S608 - a number
        assert outbox(now, "a", made_on) == []
        await now.daemons["site-a"].start()
        await until(now, reached(version + 1))
        assert len(outbox(now, "a", made_on)) == 1

        await until(now, in_state("site-a", "training"))
        now.links["site-a"].cut()
        [(update_id,)] = await found(now, lambda: outbox(now, "a", UNSENT) or None)
        await now.daemons["site-a"].kill()
        now.links["site-a"].restore()
        await now.daemons["site-a"].start()
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
    assert sent(now, "a").count(update_id) == 1
    assert ledger.accepted[APPLIED] == 2 * 3


async def test_a_site_killed_in_encrypting_makes_the_very_same_update_again(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(PAIR, **wide(tmp_path, 1_300_000), stop={"max_versions": 2})
    unfinished = "SELECT DISTINCT update_id FROM chunk WHERE update_id NOT IN (SELECT update_id FROM outgoing)"
    residual = "SELECT start, data FROM residual WHERE sequence > (SELECT MIN(sequence) FROM outgoing) ORDER BY start"

    async with running(federation, tmp_path / "out") as now:
        await found(now, lambda: outbox(now, "a", "SELECT 1 FROM outgoing") or None)
        await found(now, lambda: (outbox(now, "a", unfinished) and outbox(now, "a", residual)[3:]) or None)
        await now.daemons["site-a"].kill()
        [(killed_id,)] = outbox(now, "a", unfinished)
        left = outbox(now, "a", residual)
        await now.daemons["site-a"].start()
        await found(now, lambda: outbox(now, "a", "SELECT 1 FROM outgoing LIMIT 1 OFFSET 1") or None)
        # Version, seed and residual are the same, so both computations give the same update, which counts once.
        assert outbox(now, "a", residual)[: len(left)] == left
        assert outbox(now, "a", f"SELECT 1 FROM chunk WHERE update_id = '{killed_id}'") == []  # noqa: S608 - an id
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
    assert ledger.accepted[APPLIED] == 2 * 2


async def test_a_site_killed_between_bus_and_ack_is_known_again(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(PAIR, stop={"max_versions": 4})
    async with running(federation, tmp_path / "out", {"site-a": WanSettings(delay_ms=400)}) as now:

        def taken_and_not_acked() -> str | None:
            unsent = {identity for (identity,) in outbox(now, "a", UNSENT)}
            return next(iter(unsent & taken(now, "north")), None) if unsent else None

        update_id = await found(now, taken_and_not_acked)
        await now.daemons["site-a"].kill()
        assert (update_id,) in outbox(now, "a", UNSENT)
        await now.daemons["site-a"].start()
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
    assert sent(now, "a").count(update_id) == 1
    assert ledger.accepted[APPLIED] == 2 * 4


async def test_a_site_trains_on_without_its_link_and_catches_up(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(PAIR, stop={"max_versions": 8})
    async with running(federation, tmp_path / "out", {"site-a": WanSettings()}) as now:
        await until(now, reached(1))
        link = now.links["site-a"]
        link.cut()
        link.restore()  # resets connections, which the site notices at once; it then waits only the usual time
        link.cut()
        statuses = await until(now, lambda statuses: outbox_of(statuses, "a").get("dropped", 0) >= 3)
        assert statuses["site-a"]["outbox"]["waiting"] == 4
        assert not statuses["site-a"]["ready"]
        sequences = [number for (number,) in outbox(now, "a", UNSENT.replace("update_id", "sequence", 1))]
        assert sequences[1:] == list(range(sequences[-1] - 2, sequences[-1] + 1))  # the first may be sent in part
        version = statuses["coordinator"]["version"]
        link.restore()
        await until(now, closed)
        statuses = await until(now, lambda statuses: outbox_of(statuses, "a").get("waiting") == 0)
        ledger = await balanced(tmp_path / "out")
    assert version < 8
    assert logged(now, "site-a", "training_on_without_the_bus")
    assert ledger.updates["refused: Reason.TOO_STALE"] == 0
    assert set(ledger.accepted) <= {APPLIED, "left over above"}


async def test_sending_goes_on_where_a_killed_site_was(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = large_and_plain(make_federation, tmp_path, 1_300_000)
    federation = federation.model_copy(update={"delta": DeltaSettings(chunk_bytes=64 * 1024)})  # a ciphertext a chunk
    async with running(federation, tmp_path / "out", {"site-a": WanSettings(mbit=8)}) as now:
        link = now.links["site-a"]
        [(head,)] = await found(now, lambda: outbox(now, "a", "SELECT head FROM outgoing") or None)
        before = link.bytes_up
        n_bytes = wire.unpack(head, Update).payload.n_bytes
        partly_sent = "SELECT 1 FROM outgoing WHERE sent_chunks > 0 AND sent_at IS NULL"
        await found(now, lambda: outbox(now, "a", partly_sent) or None)
        await now.daemons["site-a"].kill()
        assert outbox(now, "a", partly_sent)
        await now.daemons["site-a"].start()
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
        assert n_bytes < link.bytes_up - before < 1.5 * n_bytes
    assert ledger.accepted[APPLIED] == 2
    recorded = audited(tmp_path / "out")["site-a"]
    first, second = (record for record in recorded if record.name == wire.unpack(head, Update).update_id)
    assert (first.digest, first.detail) == (second.digest, "")
    assert re.fullmatch(r"from chunk \d+ on", second.detail)
    assert n_bytes < first.n_bytes + second.n_bytes < 2 * n_bytes


async def test_fetching_goes_on_where_a_killed_site_was(make_federation: MakeFederation, tmp_path: Path) -> None:
    n_parameters = 2_000_000
    federation = large_and_plain(make_federation, tmp_path, n_parameters)
    async with running(federation, tmp_path / "out", {"site-a": WanSettings(mbit=24)}) as now:
        link = now.links["site-a"]
        folder = model_folder(now.output / "site-a")
        n_bytes = 4 * n_parameters

        def half_fetched() -> bool | None:
            return sum(file.stat().st_size for file in folder.glob("frame-*")) > n_bytes / 2 or None

        await found(now, half_fetched)
        await now.daemons["site-a"].kill()
        await now.daemons["site-a"].start()
        await until(now, lambda statuses: statuses.get("site-a", {}).get("version", -1) >= 0)  # it trains, or has
        assert link.bytes_down < 1.4 * n_bytes
        await until(now, closed)
        ledger = await balanced(tmp_path / "out")
    assert ledger.accepted[APPLIED] == 2


# --- helpers ------------------------------------------------------------------------------------------------------


def large_and_plain(make_federation: MakeFederation, folder: Path, n_parameters: int) -> Any:
    """Return a federation for one version of a model that takes seconds over a slow link, in many small chunks."""
    return make_federation(
        PAIR,
        **wide(folder, n_parameters),
        training={"local_steps": 2, "batch_size": 16, "learning_rate": 0.01},
        delta={"cipher": "none", "chunk_bytes": 16 * 1024},
        stop={"max_versions": 1},
    )


def sent(now: Running, site: str) -> list[str]:
    return [line["update_id"] for line in logged(now, f"site-{site}", "update_sent")]


def taken(now: Running, region: str) -> set[str]:
    arrived = [event for event in events(now, f"aggregator-{region}") if isinstance(event, ContributionArrived)]
    return {event.head.update_id for event in arrived if isinstance(event.head, Update)}
