"""Receipts: what a region says became of an update, and what its site does about it."""

from collections.abc import Sequence

import pytest

from fednats.errors import Reason
from fednats.messages import Verdict
from fednats.protocol.refusals import (
    FIRST_PAUSE_S,
    IN_A_ROW,
    LONGEST_PAUSE_S,
    REACTIONS,
    Pauses,
    Reaction,
    sent_by_another,
)

ACCEPTED, REPLAYED = "accepted", "replayed"


def verdict(name: str, sequence: int, became: str) -> Verdict:
    return Verdict.model_validate(
        {
            "name": name,
            "sequence": sequence,
            "outcome": "accepted" if became == ACCEPTED else "refused",
            "reason": "" if became == ACCEPTED else became,
            "detail": "",
            "ledger_head": "0" * 64,
        }
    )


@pytest.mark.parametrize(
    ("verdicts", "ends"),
    [
        ([verdict("mine-7", 7, ACCEPTED), verdict("copy-7", 7, REPLAYED), verdict("mine-8", 8, REPLAYED)], False),
        ([verdict("mine-7", 7, REPLAYED)], True),
        ([verdict("copy-9", 9, ACCEPTED)], True),
        ([verdict("before-3", 3, ACCEPTED)], False),
        ([verdict("garbage", 0, "malformed")], False),
        ([], False),
    ],
    ids=[
        "the other was refused first",
        "refused first",
        "the other is ahead",
        "an earlier outbox",
        "garbage",
        "nothing",
    ],
)
def test_of_two_processes_that_send_as_one_site_the_first_that_is_refused_ends(
    verdicts: Sequence[Verdict], *, ends: bool
) -> None:
    assert (sent_by_another(verdicts, {"mine-7", "mine-8"}, newest=8) is not None) is ends


def test_a_refusal_that_will_repeat_stops_training_for_pauses_that_double() -> None:
    pauses = Pauses()
    assert [pauses.refused(Reason.MALFORMED) for _ in range(3)] == [FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S]
    assert max(pauses.refused(Reason.MALFORMED) for _ in range(10)) == LONGEST_PAUSE_S
    pauses.accepted()
    assert pauses.refused(Reason.MALFORMED) == FIRST_PAUSE_S


def test_a_refusal_that_may_not_repeat_stops_training_when_it_repeats() -> None:
    pauses = Pauses()
    assert [pauses.refused(Reason.WRONG_GRID) for _ in range(IN_A_ROW)] == [0.0] * (IN_A_ROW - 1) + [FIRST_PAUSE_S]
    assert Pauses().refused(None) == 0.0
    over = Pauses()
    assert [over.refused(Reason.EARLIER_RUN) for _ in range(2 * IN_A_ROW)] == [0.0] * 2 * IN_A_ROW


def test_every_reason_that_an_update_is_refused_for_has_a_reaction() -> None:
    of_others = {Reason.POLICY, Reason.OVERWEIGHT, Reason.NOT_FINITE, Reason.SEAL, Reason.OUTLIER, Reason.TEST_CASES}
    assert set(REACTIONS) == set(Reason) - of_others
    assert [reason for reason, reaction in REACTIONS.items() if reaction is Reaction.END] == [Reason.REPLAYED]
