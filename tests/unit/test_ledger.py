"""`fednats verify`: what it lets pass, and what it finds."""

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fednats.cli import app
from fednats.errors import ConfigError, Reason
from fednats.ledger.records import EGRESS_FILE, LEDGER_FILE
from fednats.protocol import sequences
from fednats.protocol import settled as settled_ids
from fednats.protocol.compositions import composition_of
from fednats.protocol.events import Combined, CombineFailed, ContributionArrived, DeadlineReached, Restored
from fednats.services.daemon.recorder import entry_of
from fednats.verify import joined as ledger_of_a_run
from fednats.verify.books import Book
from fednats.verify.joined import APPLIED, OVERTAKEN_S, Books, settled, verify
from tests.makers import announcement, closed, update
from tests.small_run import SETTINGS, SmallRun

Rows = list[list[Any]]
Change = Callable[[Rows], Rows]


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    made = SmallRun(tmp_path)
    made.rounds(3)
    return made


def found(run: SmallRun) -> Books:
    return verify(run.directory)


def nth(rows: Rows, kind: str, number: int) -> int:
    return [index for index, row in enumerate(rows) if row[1] == kind][number]


def without(kind: str, number: int) -> Change:
    def change(rows: Rows) -> Rows:
        del rows[nth(rows, kind, number)]
        return rows

    return change


def twice(kind: str, number: int) -> Change:
    def change(rows: Rows) -> Rows:
        index = nth(rows, kind, number)
        return [*rows[: index + 1], rows[index], *rows[index + 1 :]]

    return change


def with_head(number: int, **fields: object) -> Change:
    def change(rows: Rows) -> Rows:
        rows[nth(rows, "contribution_arrived", number)][2]["head"] |= fields
        return rows

    return change


def until(kind: str, number: int) -> Change:
    return lambda rows: rows[: nth(rows, kind, number)]


# --- what passes ------------------------------------------------------------------------------------------------------


def test_every_accepted_update_is_applied(run: SmallRun) -> None:
    ledger = found(run)
    assert ledger.findings == ledger.notes == []
    assert +ledger.updates == {"sent": 12, "in a sum": 12}
    assert +ledger.sums == {"sent": 6, "in a sum": 6}
    assert ledger.accepted == {"applied": 12}
    assert ledger.line == "accepted 12 = applied 12; 6 sums weighed; nothing lost, nothing twice"


def test_the_command_prints_the_table_and_exits_with_the_result(run: SmallRun) -> None:
    passed = CliRunner().invoke(app, ["verify", str(run.directory)])
    assert passed.exit_code == 0
    assert "in a sum" in passed.output
    assert passed.output.splitlines()[-1].startswith("accepted 12 = applied 12;")
    run.tamper("north", without("combined", 1))
    failed = CliRunner().invoke(app, ["verify", str(run.directory)])
    assert failed.exit_code == 1
    assert "aggregator-north/journal.sqlite: event" in failed.output


def test_delivering_everything_again_changes_nothing(run: SmallRun) -> None:
    for node in ("north", "south", "hub"):
        run.tamper(node, lambda rows: [*rows, *(row for row in rows if row[1] == "contribution_arrived")])
    ledger = found(run)
    assert ledger.findings == []
    assert ledger.accepted == {"applied": 12}


def test_a_region_killed_between_publishing_and_writing_that_down_is_sound(run: SmallRun) -> None:
    _, aggregate = run.sum_up("north", run.send("north", "a"), run.send("north", "b"))
    assert found(run).updates["waiting"] == 2
    run.apply(aggregate)
    ledger = found(run)
    assert ledger.findings == []
    assert ledger.accepted == {"applied": 14}


def test_a_coordinator_killed_between_applying_and_writing_that_down_is_sound(run: SmallRun) -> None:
    made, aggregate = run.sum_up("north", run.send("north", "a"), run.send("north", "b"))
    run.regions["north"].feed(run.now_s, Combined(combination_id=made.combination_id))
    version = run.hub.feed(run.now_s, ContributionArrived(head=aggregate))
    assert version is not None
    assert found(run).accepted == {"applied": 12, "waiting above": 2}
    run.checkpoint(7, version.combination_id)
    ledger = found(run)
    assert ledger.findings == []
    assert ledger.accepted == {"applied": 14}


def test_what_the_run_leaves_over_when_it_closes_is_said(run: SmallRun) -> None:
    late = run.send("north", "a")
    run.regions["north"].feed(run.now_s, ContributionArrived(head=late), closed())
    run.regions["north"].feed(run.now_s, ContributionArrived(head=run.send("north", "b")))
    ledger = found(run)
    assert ledger.findings == []
    assert +ledger.updates == {"sent": 14, "in a sum": 12, "left over": 2}


def test_refusals_by_rule_are_counted_and_pass(run: SmallRun) -> None:
    stale = run.send("north", "a")
    run.regions["north"].feed(run.now_s, announcement(run.version + 9, settings=SETTINGS))
    run.regions["north"].feed(run.now_s, ContributionArrived(head=stale))
    ledger = found(run)
    assert ledger.findings == []
    assert ledger.updates["refused: too_stale"] == 1


def test_garbage_in_the_name_of_a_site_is_a_note(run: SmallRun) -> None:
    forged = update("a", 4, version=run.version)
    made, _ = run.sum_up("north", forged, run.send("north", "b"))
    refused = {forged.update_id: (Reason.CIPHERTEXT, "noise")}
    run.regions["north"].feed(run.now_s, CombineFailed(combination_id=made.combination_id, refused=refused))
    ledger = found(run)
    assert ledger.findings == []
    assert ledger.updates["refused: ciphertext"] == 1
    assert ledger.notes == ["update a-4 came in the name of a, whose outbox does not know it: refused: ciphertext"]


def test_a_contribution_that_the_stream_lost_may_come_again(run: SmallRun) -> None:
    first, second = run.send("north", "a"), run.send("north", "b")
    made, _ = run.sum_up("north", first, second)
    node = run.regions["north"]
    vanished = (first.update_id,)
    node.feed(run.now_s, CombineFailed(combination_id=made.combination_id, refused={}, vanished=vanished))
    assert found(run).updates["under way"] == 1
    again, aggregate = run.sum_up("north", first)
    assert again.combination_id == made.combination_id
    node.feed(run.now_s, Combined(combination_id=again.combination_id))
    run.apply(aggregate)
    assert found(run).findings == []
    assert found(run).accepted == {"applied": 14}


# --- what is lost -----------------------------------------------------------------------------------------------------


def after_a_gap(run: SmallRun, wait_s: float) -> Books:
    """The fourth update of a is sent and never comes; its fifth does, and the region goes on for a while."""
    run.send("north", "a")
    node = run.regions["north"]
    node.feed(run.now_s, ContributionArrived(head=run.send("north", "a")))
    run.now_s += wait_s
    node.feed(run.now_s, DeadlineReached())
    return found(run)


def test_an_update_that_was_overtaken_for_long_is_lost(run: SmallRun) -> None:
    ledger = after_a_gap(run, OVERTAKEN_S + 1)
    assert ledger.findings == ["lost: update a-4 of a was overtaken and never came to north"]
    assert (ledger.updates["lost"], ledger.updates["under way"]) == (1, 0)
    assert ledger.line.endswith("1 findings")


def test_an_update_that_was_overtaken_just_now_is_under_way(run: SmallRun) -> None:
    ledger = after_a_gap(run, 5.0)
    assert ledger.findings == []
    assert (ledger.updates["lost"], ledger.updates["under way"]) == (0, 1)


def test_the_newest_update_is_under_way_for_as_long_as_it_takes(run: SmallRun) -> None:
    run.send("north", "a")
    run.regions["north"].feed(run.now_s + 10_000, DeadlineReached())
    ledger = found(run)
    assert ledger.findings == []
    assert ledger.updates["under way"] == 1


def test_a_sum_that_was_overtaken_for_long_is_lost(run: SmallRun) -> None:
    node = run.regions["north"]
    for arrives in (False, True):
        made, aggregate = run.sum_up("north", run.send("north", "a"), run.send("north", "b"))
        node.feed(run.now_s, Combined(combination_id=made.combination_id))
        if arrives:
            run.apply(aggregate)
        else:
            missing = made.combination_id
    assert found(run).accepted == {"applied": 14, "under way above": 2}
    run.hub.feed(run.now_s + OVERTAKEN_S + 1, DeadlineReached())
    ledger = found(run)
    assert ledger.findings == [f"lost: sum {missing} of north was overtaken and never came to hub"]
    assert ledger.accepted == {"applied": 14, "lost above": 2}


# --- the end of a run -------------------------------------------------------------------------------------------------


async def test_what_is_sent_and_never_comes_before_the_books_are_closed_is_found(
    run: SmallRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_of_a_run, "OVERTAKEN_S", 0.0)
    run.send("north", "a")
    assert (await settled(run.directory)).findings == [], "the region does not know of the end, and may take it in yet"
    run.regions["north"].feed(run.now_s, closed())
    ledger = await settled(run.directory)
    (finding,) = ledger.findings
    assert finding.startswith("undelivered: update a-4 of a has not come to north, which knows that the run is closed")
    assert ledger.updates["under way"] == 1


async def test_the_end_of_a_run_waits_for_what_is_under_way(run: SmallRun) -> None:
    last = run.send("north", "a")
    run.regions["north"].feed(run.now_s, closed())
    settling = asyncio.create_task(settled(run.directory))
    while not (await asyncio.to_thread(verify, run.directory)).undelivered:
        pass
    assert not settling.done()
    run.regions["north"].feed(run.now_s, ContributionArrived(head=last))
    ledger = await settling
    assert ledger.findings == []
    assert (ledger.updates["under way"], ledger.updates["left over"]) == (0, 1)


# --- what does not agree ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "change", "finding"),
    [
        pytest.param("north", without("contribution_arrived", 2), "does not follow", id="an update is gone"),
        pytest.param("north", without("combined", 1), "does not follow", id="a sum was never made"),
        pytest.param("north", twice("combined", 1), "does not follow", id="a sum was made twice"),
        pytest.param("hub", without("contribution_arrived", 2), "does not follow", id="a sum is gone"),
        pytest.param("hub", without("version_announced", 2), "announces version 3 after 1", id="a version is gone"),
        pytest.param("north", with_head(2, n_samples=999), "altered: update a-2", id="an update has more samples"),
        pytest.param("north", with_head(2, n_samples=999), "weights: sum", id="so the sum weighs more"),
        pytest.param("hub", with_head(2, mass=5.0), "mass is 5.0, the region's", id="a sum weighs less above"),
        pytest.param("hub", with_head(2, total_weight=7), "total_weight is 7, the", id="a sum is divided by less"),
        pytest.param(
            "hub", with_head(2, staleness_max=3, staleness_sum=3), "staleness_max is 3, the", id="a sum is older above"
        ),
        pytest.param("hub", with_head(2, aggregate_id="x"), "unknown: hub took in sum x", id="a sum nobody made"),
        pytest.param("north", until("combined", 1), "unknown: hub took in sum", id="the region's journal is old"),
        pytest.param("hub", until("combined", 4), "which the journal does not say", id="the hub's journal is old"),
    ],
)
def test_journals_that_do_not_agree_are_found(run: SmallRun, node: str, change: Change, finding: str) -> None:
    run.tamper(node, change)
    assert any(finding in text for text in found(run).findings), found(run).findings


def test_a_deleted_event_leaves_a_gap_that_is_found(run: SmallRun) -> None:
    run.regions["north"].journal._connection.execute("DELETE FROM event WHERE sequence IN (5, 6)")
    assert "aggregator-north/journal.sqlite: events 5 to 6 are missing" in found(run).findings


def test_an_update_that_counts_twice_is_found(run: SmallRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would if a region forgot what it has summed."""
    monkeypatch.setattr(settled_ids, "REMEMBERED", 0)
    monkeypatch.setattr(sequences.Sequences, "settle", lambda _self, _sequence: None)
    first = run.send("north", "a")
    for other in (run.send("north", "b"), run.send("north", "b")):
        made, aggregate = run.sum_up("north", first, other)
        run.regions["north"].feed(run.now_s, Combined(combination_id=made.combination_id))
        run.apply(aggregate)
    (finding,) = found(run).findings
    assert finding.startswith("twice: update a-4 of a is in ")


def test_an_honest_update_that_is_refused_as_damaged_is_found(run: SmallRun) -> None:
    made, _ = run.sum_up("north", run.send("north", "a"), run.send("north", "b"))
    refused = {"a-4": (Reason.CHECKSUM, "chunk 0 is missing")}
    run.regions["north"].feed(run.now_s, CombineFailed(combination_id=made.combination_id, refused=refused))
    assert found(run).findings == ["damaged: update a-4 of a was sent whole and refused: checksum"]


@pytest.mark.parametrize(("reason", "passes"), [(Reason.CIPHERTEXT, False), (Reason.TOO_STALE, True)])
def test_a_sum_may_be_refused_above_for_its_age_only(run: SmallRun, reason: Reason, passes: bool) -> None:  # noqa: FBT001
    made, aggregate = run.sum_up("north", run.send("north", "a"), run.send("north", "b"))
    run.regions["north"].feed(run.now_s, Combined(combination_id=made.combination_id))
    version = run.hub.feed(run.now_s, ContributionArrived(head=aggregate))
    assert version is not None
    refused = {aggregate.aggregate_id: (reason, "")}
    run.hub.feed(run.now_s, CombineFailed(combination_id=version.combination_id, refused=refused))
    ledger = found(run)
    assert (ledger.findings == []) is passes
    assert ledger.accepted == {"applied": 12, "refused above": 2}


def test_an_update_that_the_outbox_dropped_must_not_count(run: SmallRun) -> None:
    """What it changed went back into the site's residual and is in the site's next update."""
    outbox = run.outboxes["a"]._database.connection
    if "dropped_at" not in [column[1] for column in outbox.execute("PRAGMA table_info(outgoing)")]:
        outbox.execute("ALTER TABLE outgoing ADD COLUMN dropped_at TEXT")
    outbox.execute("UPDATE outgoing SET sent_at = NULL, dropped_at = 'now' WHERE sequence = 2")
    (finding,) = found(run).findings
    assert finding.startswith("twice: update a-2 of a was dropped")


def test_an_outbox_with_a_gap_is_found(run: SmallRun) -> None:
    run.outboxes["a"]._database.connection.execute("DELETE FROM outgoing WHERE sequence = 2")
    ledger = found(run)
    assert ledger.findings == ["outbox: the updates of a are numbered [1, 3], with a gap"]
    assert ledger.notes == ["update a-2 came in the name of a, whose outbox does not know it: in a sum"]


def test_books_that_are_not_there_are_named(run: SmallRun, tmp_path: Path) -> None:
    (run.directory / "aggregator-south" / "journal.sqlite").rename(tmp_path / "elsewhere")
    (run.directory / "site-a" / "outbox.sqlite").rename(tmp_path / "nowhere")
    findings = found(run).findings
    assert any("aggregator-south/journal.sqlite is missing" in text for text in findings)
    assert any("site-a/outbox.sqlite is missing" in text for text in findings)
    with pytest.raises(ConfigError, match="output folder of a run"):
        verify(tmp_path / "absent")


def test_a_checkpoint_that_is_older_than_the_journal_is_found(run: SmallRun) -> None:
    for version in (5, 6):
        (run.directory / "coordinator" / "checkpoints" / f"version-{version}.msgpack").unlink()
    assert found(run).findings == ["checkpoint: the journal has 6 versions, the newest on disk is 4"]


def test_weights_that_are_not_those_announced_are_found(run: SmallRun) -> None:
    file = run.directory / "coordinator" / "checkpoints" / "version-6.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert found(run).findings == ["checkpoint: the weights of version 6 are not those announced: another digest"]


def egress(run: SmallRun, change: Callable[[list[bytes]], list[bytes]]) -> list[str]:
    """Change the egress ledger of site a; return what is found."""
    file = run.directory / "site-a" / EGRESS_FILE
    file.write_bytes(b"".join(change(file.read_bytes().splitlines(keepends=True))))
    return found(run).findings


def test_an_end_that_was_cut_off_a_ledger_is_found(run: SmallRun) -> None:
    """No chain says where it ends; the outbox and the region do."""
    assert egress(run, lambda lines: lines[:-1]) == ["egress: update a-3 left a and is not in its ledger"]


def test_a_ledger_that_was_altered_is_found(run: SmallRun) -> None:
    findings = egress(run, lambda lines: [lines[0], lines[1].replace(b'"n_messages":2', b'"n_messages":1'), lines[2]])
    assert findings == ["egress: site-a/egress-ledger.jsonl: line 2: altered, its hash is of something else"]


def test_a_ledger_that_is_gone_is_found(run: SmallRun) -> None:
    (run.directory / "site-a" / EGRESS_FILE).unlink()
    assert found(run).findings == ["egress: site-a/egress-ledger.jsonl is missing: what left a cannot be verified"]


def test_an_update_of_another_content_than_on_record_is_found(run: SmallRun) -> None:
    head = update("a", 4, version=run.version)
    run.outboxes["a"].add_update(head, (1.0,), None)
    other = head.model_copy(update={"n_samples": 7})
    run.ledgers["a"].append(entry_of("update", other, version=0, name="a-4", payload=head.payload))
    assert found(run).findings == []  # it has not left
    run.outboxes["a"].mark_sent("a-4")
    assert found(run).findings == ["egress: update a-4 left a and is not in its ledger"]


def test_the_chain_of_a_region_is_looked_at_too(run: SmallRun) -> None:
    (run.directory / "aggregator-north" / LEDGER_FILE).write_text("{}\n")
    assert found(run).findings[0].startswith("egress: aggregator-north/ledger.jsonl: line 1: damaged or altered")


def restored(run: SmallRun, unknown: tuple[int, ...] = ()) -> None:
    """Let the coordinator have lost its journal after version 4, and know versions 5 and 6 from its notes only."""
    combinations = [
        made.combination for made in Book("hub", run.directory / "coordinator" / "journal.sqlite").made.values()
    ]
    noted = {
        version: composition_of("r", "hub", combination, "", None)
        for version, combination in enumerate(combinations, 1)
        if combination is not None
    }
    made = tuple(noted[version] for version in (5, 6) if version not in unknown)
    event = Restored(version=6, made=made, unknown=unknown)

    def change(rows: Rows) -> Rows:
        announced = announcement(6, settings=SETTINGS, capacity=None)
        later = [[run.now_s, event.kind, event.model_dump()], [run.now_s, announced.kind, announced.model_dump()]]
        return [*rows[: nth(rows, "combined", 3) + 1], *later]

    run.tamper("hub", change)


def test_what_a_restored_coordinator_had_applied_is_known_from_its_notes(run: SmallRun) -> None:
    before = found(run)
    restored(run)
    after = found(run)
    assert after.findings == []
    assert (after.accepted, after.sums, after.n_weighed) == (before.accepted, before.sums, before.n_weighed)
    assert after.notes == [
        "restored: hub from a backup; 2 combinations that its journal lacks are known from its notes"
    ]
    run.rounds(1)
    assert found(run).findings == []


def test_versions_that_no_note_tells_of_are_a_finding(run: SmallRun) -> None:
    restored(run, unknown=(5,))
    assert "restored: what versions [5] were made of is not known" in found(run).findings


def test_the_books_go_on_over_an_extension_and_another_run(run: SmallRun) -> None:
    late = run.send("north", "a")
    run.regions["north"].feed(run.now_s, ContributionArrived(head=late))
    run.end()
    for name in ("r", "second"):
        run.begin(name)
        assert found(run).findings == [], "killed before the first version was made"
        run.checkpoint(run.version + 1, made_by="")
        assert found(run).findings == [], "killed before that was written down"
        run.announce(run.version + 1, made_by="")
        run.rounds(1)
        assert found(run).findings == []
        run.end()
    ledger = found(run)
    assert ledger.findings == []
    assert ledger.updates["left over"] == 1
    assert [line.partition(",")[0] for line in ledger.runs] == [
        "run r: versions 0 to 9",
        "run second: versions 10 to 12",
    ]


def test_a_sum_that_comes_when_another_run_has_begun_is_refused_by_rule(run: SmallRun) -> None:
    heads = [run.send("north", site) for site in ("a", "b")]
    combination, aggregate = run.sum_up("north", *heads)
    run.regions["north"].feed(run.now_s, Combined(combination_id=combination.combination_id))
    run.end()
    run.begin("second")
    run.announce(run.version + 1, made_by="")
    run.hub.feed(run.now_s, ContributionArrived(head=aggregate))
    ledger = found(run)
    assert ledger.findings == []
    assert ledger.sums["refused: earlier_run"] == 1
    assert ledger.accepted["refused above"] == 2


def test_kits_as_they_stand_in_the_field_are_verified(run: SmallRun) -> None:
    n_applied = verify(run.directory).accepted[APPLIED]
    for name in (
        "coordinator",
        *(f"aggregator-{region}" for region in run.regions),
        *(f"site-{s}" for s in run.outboxes),
    ):
        kit = run.directory / name.replace("aggregator", "region")
        state = run.directory / name
        state.rename(run.directory / "moved")
        kit.mkdir()
        (run.directory / "moved").rename(kit / "state")
    found = verify(run.directory)
    assert found.findings == []
    assert found.accepted[APPLIED] == n_applied > 0


def test_a_journal_of_another_release_is_named_and_the_others_are_verified(run: SmallRun) -> None:
    n_applied = verify(run.directory).accepted[APPLIED]
    connection = run.regions["south"].journal._connection
    connection.execute("UPDATE event SET kind = 'novel' WHERE sequence = (SELECT MAX(sequence) FROM event)")
    connection.execute("INSERT OR REPLACE INTO written_by SELECT MAX(sequence), '9.9.9' FROM event")
    found = verify(run.directory)
    assert len(found.findings) == 1
    assert "Release 9.9.9 wrote it" in found.findings[0]
    assert found.accepted[APPLIED] == n_applied > 0


def test_updates_of_another_release_are_named_and_the_others_are_verified(run: SmallRun) -> None:
    n_applied = verify(run.directory).accepted[APPLIED]
    run.outboxes["a"]._database.connection.execute(
        "UPDATE outgoing SET head = ?", (b"a message that this release cannot read",)
    )
    found = verify(run.directory)
    assert len(found.findings) == 1
    assert re.match(r"unreadable: \d updates in the outbox of a, such as a-1: ", found.findings[0])
    assert found.accepted[APPLIED] == n_applied > 0
