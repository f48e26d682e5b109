"""`fednats verify` over sums that the coordinator left out by the rule for outliers."""

from pathlib import Path

import pytest

from fednats.messages import Aggregate
from fednats.protocol.events import Combined, ContributionArrived
from fednats.verify.joined import verify
from tests.small_run import SmallRun


@pytest.fixture
def run(tmp_path: Path) -> SmallRun:
    made = SmallRun(tmp_path)
    made.rounds(4)  # of two regions: as many norms as it takes
    return made


def published(run: SmallRun) -> Aggregate:
    made, aggregate = run.sum_up("north", run.send("north", "a"), run.send("north", "b"))
    run.regions["north"].feed(run.now_s, Combined(combination_id=made.combination_id))
    return aggregate


def test_a_quarantined_sum_is_a_named_note_and_no_finding(run: SmallRun) -> None:
    aggregate = published(run)
    run.apply(aggregate, norm=1000.0)
    ledger = verify(run.directory)
    assert ledger.findings == []
    assert ledger.notes == [f"quarantined: sum {aggregate.aggregate_id} of north by hub: its norm is an outlier"]
    assert ledger.accepted == {"applied": 16, "refused above": 2}
    assert ledger.sums["refused: outlier"] == 1
    run.rounds(1)  # and it goes on
    assert verify(run.directory).accepted == {"applied": 20, "refused above": 2}


def test_a_coordinator_killed_before_it_could_write_a_quarantine_down_is_sound(run: SmallRun) -> None:
    aggregate = published(run)
    combination = run.hub.feed(run.now_s, ContributionArrived(head=aggregate))
    assert combination is not None
    run.checkpoint(run.version + 1, combination.combination_id, {aggregate.aggregate_id: "norm 1000"})
    ledger = verify(run.directory)
    assert ledger.findings == []
    assert ledger.accepted == {"applied": 16, "refused above": 2}
    assert ledger.notes


@pytest.mark.parametrize(("norm", "says"), [(1000.0, {}), (1.0, "everything")], ids=["let pass", "left out"])
def test_what_was_not_decided_by_the_rule_is_found(run: SmallRun, norm: float, says: dict[str, str] | str) -> None:
    aggregate = published(run)
    run.apply(aggregate, norm=norm)
    quarantined = {aggregate.aggregate_id: "because"} if says else {}

    def change(rows: list[list[object]]) -> list[list[object]]:
        (*_, last) = (row for row in rows if row[1] == "combined")
        assert isinstance(last[2], dict)
        last[2]["quarantined"] = quarantined
        return rows

    run.tamper("hub", change)
    (finding,) = (text for text in verify(run.directory).findings if "by rule" in text)
    assert aggregate.aggregate_id in finding
