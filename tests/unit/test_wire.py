import struct

import msgpack
import pytest
import zstandard

from fednats import wire
from fednats.errors import Reason, RefusedError
from fednats.messages import Aggregate, Chunk, Evaluation, Update
from tests.makers import aggregate, evaluation, update

EVALUATION = evaluation("a", 3, auc=0.75)


def packed(body: object, *, encoding: int = 0, version: int = wire.SCHEMA_VERSION, length: int | None = None) -> bytes:
    plain = msgpack.packb(body)
    data = zstandard.compress(plain) if encoding == 1 else plain
    return struct.pack(">2sBBI", b"FN", version, encoding, len(plain) if length is None else length) + data


def reason(data: bytes, expected: type[Evaluation] | type[Chunk] = Evaluation) -> Reason:
    with pytest.raises(RefusedError) as raised:
        wire.unpack(data, expected)
    return raised.value.reason


def test_messages_come_back_as_they_went() -> None:
    assert wire.unpack(wire.pack(EVALUATION), Evaluation) == EVALUATION
    assert wire.unpack(wire.pack(update("a")), Update) == update("a")


def test_only_what_shrinks_is_compressed() -> None:
    assert len(wire.pack(Chunk(parts=(bytes(100_000),)))) < 1000
    noise = zstandard.compress(bytes(range(256)) * 40) * 3
    assert len(wire.pack(Chunk(parts=(noise,)))) <= len(noise) + 40


def test_an_unknown_field_a_wrong_type_and_a_missing_one_are_refused() -> None:
    fields = EVALUATION.model_dump()
    for bad in ({**fields, "extra": 1}, {**fields, "version": "3"}, {**fields, "version": -1}):
        assert reason(packed(["evaluation", bad])) is Reason.MALFORMED
    del fields["site"]
    with pytest.raises(RefusedError, match=r"evaluation\.site"):
        wire.unpack(packed(["evaluation", fields]), Evaluation)


def test_not_a_number_is_refused() -> None:
    fields = {**EVALUATION.model_dump(), "metrics": {"auc": float("nan")}}
    assert reason(packed(["evaluation", fields])) is Reason.MALFORMED


def test_another_kind_is_refused() -> None:
    assert reason(wire.pack(EVALUATION), Chunk) is Reason.MALFORMED


def test_another_schema_version_says_so() -> None:
    assert reason(packed(["evaluation", {}], version=9)) is Reason.SCHEMA_VERSION


def test_the_size_is_checked_before_anything_is_unpacked() -> None:
    bomb = packed(bytes(wire.MAX_MESSAGE_BYTES + 1), encoding=1)
    assert len(bomb) < 2000
    assert reason(bomb) is Reason.OVERSIZED


def test_a_bomb_that_lies_about_its_size_is_refused() -> None:
    assert reason(packed(bytes(10_000_000), encoding=1, length=10)) is Reason.MALFORMED


@pytest.mark.parametrize("data", [b"", b"FN", b"XX" + bytes(20), packed(["evaluation"]), packed({"a": 1}), packed(7)])
def test_garbage_is_refused(data: bytes) -> None:
    assert reason(data) is Reason.MALFORMED


def test_every_truncation_is_refused() -> None:
    for data in (wire.pack(EVALUATION), wire.pack(Chunk(parts=(bytes(5000),)))):
        for length in range(len(data)):
            assert reason(data[:length], Evaluation) in {Reason.MALFORMED, Reason.OVERSIZED}


def test_deep_nesting_is_refused() -> None:
    assert reason(struct.pack(">2sBBI", b"FN", 1, 0, 100_000) + b"\x91" * 100_000) is Reason.MALFORMED


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_sites": 3}, "2 updates of 3 sites"),
        ({"total_weight": 1}, "with total weight 1"),
        ({"n_samples": 1}, "and 1 cases"),
        ({"staleness_sum": 7, "staleness_max": 3}, "staleness 7 in all and 3 at most of 2 updates"),
        ({"staleness_sum": 2, "staleness_max": 3}, "staleness 2 in all and 3 at most"),
    ],
)
def test_a_sum_whose_head_contradicts_itself_is_refused(changes: dict[str, int], said: str) -> None:
    head = aggregate("north")
    assert (head.n_updates, head.n_sites, head.total_weight) == (2, 2, 10)
    with pytest.raises(RefusedError, match=said) as refused:
        wire.unpack(wire.pack(head.model_copy(update=changes)), Aggregate)
    assert refused.value.reason is Reason.MALFORMED
