"""Evaluations that cannot be summed are left out and named; the others are summed, or nothing is sent."""

from collections.abc import AsyncGenerator, Sequence

import numpy as np
import pytest
import structlog

from fednats.config import DeltaSettings
from fednats.crypto import secret
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.encode import encoder
from fednats.delta.sum import summer
from fednats.errors import Reason, RefusedError
from fednats.learning.scores import Counts, n_counts
from fednats.messages import Evaluation
from fednats.protocol.events import SumEvaluations
from fednats.services.tier.evaluations import EvaluationPart, Summing, payload_of, sites_of, sum_of
from tests.makers import PAYLOAD, evaluation, evaluation_sum

BFV = DeltaSettings()
SECRET, PUBLIC = secret.generate(scheme.bfv(BFV).parameters)
KEY_ID = encoder(BFV, PUBLIC).key_id


def counts(seed: int) -> Counts:
    rng = np.random.default_rng(seed)
    return Counts.of(rng.normal(size=(40, 2)), rng.integers(0, 2, 40))


OWN = {site: counts(seed) for seed, site in enumerate("abcd")}
SENT = {site: encoder(BFV, PUBLIC).encode_counts(own.flat()) for site, own in OWN.items()}


def head(site: str, key_id: str = KEY_ID, n_classes: int = 2) -> Evaluation:
    return evaluation(site).model_copy(update={"key_id": key_id, "n_classes": n_classes})


async def summed(
    parts: Sequence[Evaluation], min_sites: int = 2, key_ids: tuple[str, ...] = (KEY_ID,), **chunks: tuple[bytes, ...]
) -> tuple[str, Counts | None, list[str]]:
    """Return the sites in the sum, what it is, and who was left out."""

    async def read(part: EvaluationPart) -> AsyncGenerator[bytes, None]:
        assert isinstance(part, Evaluation)
        sent = {**SENT, **chunks}[part.site]
        if not sent:
            raise RefusedError(Reason.CHECKSUM, "missing")
        for chunk in sent:
            yield chunk

    async def add(inputs: Sequence[tuple[bytes, ...]], parts: Sequence[EvaluationPart]) -> tuple[bytes, ...]:
        n_sites = [sites_of([part]) for part in parts]
        return summer(BFV, PUBLIC).sum_counts(inputs, n_sites, n_counts(parts[0].n_classes))

    with structlog.testing.capture_logs() as lines:
        made, total = await Summing(read, add, key_ids, min_sites, 1000, structlog.get_logger()).run(
            SumEvaluations(0, tuple(parts))
        )
    left_out = [line["evaluation"] for line in lines if line["event"] == "evaluation_left_out"]
    names = "".join(part.site for part in made if isinstance(part, Evaluation))
    if total is None:
        return names, None, left_out
    opened = decoder(BFV, SECRET).decode_counts(total, sites_of(made), n_counts(2))
    return names, Counts.from_flat(opened, 2), left_out


async def test_all_that_is_sound_is_in_the_sum() -> None:
    names, total, left_out = await summed([head(site) for site in "abc"])
    assert (names, left_out) == ("abc", [])
    assert total is not None
    np.testing.assert_array_equal(total.flat(), (OWN["a"] + OWN["b"] + OWN["c"]).flat())


@pytest.mark.parametrize("chunks", [(b"no chunk",), (SENT["b"][0], SENT["b"][0]), ()], ids=["garbage", "two", "lost"])
async def test_what_is_damaged_or_lost_is_left_out(chunks: tuple[bytes, ...]) -> None:
    names, total, left_out = await summed([head(site) for site in "abc"], b=chunks)
    assert (names, left_out) == ("ac", ["evaluation.b.0"])
    assert total is not None
    np.testing.assert_array_equal(total.flat(), (OWN["a"] + OWN["c"]).flat())


@pytest.mark.parametrize("who", "ad")
async def test_what_names_more_chunks_than_its_counts_have_is_not_read(who: str) -> None:
    """All of it would be in memory: a site may store gigabytes of chunks, and name them all."""
    read: list[str] = []

    async def note(part: EvaluationPart) -> AsyncGenerator[bytes, None]:
        assert isinstance(part, Evaluation)
        read.append(part.site)
        yield b""

    much = head(who)
    much = much.model_copy(update={"payload": much.payload.model_copy(update={"digests": (bytes(16),) * 65_536})})
    summing = Summing(note, count, (KEY_ID,), 2, 1000, structlog.get_logger())
    made, total = await summing.run(SumEvaluations(0, (much, head("b"), head("c"))))
    assert (sites_of(made), total, read) == (2, 2, ["b", "c"])


async def test_what_has_larger_chunks_than_its_counts_can_have_is_left_out_and_not_read_on() -> None:
    n_read = 0

    async def endless(part: EvaluationPart) -> AsyncGenerator[bytes, None]:
        nonlocal n_read
        yield b""
        while isinstance(part, Evaluation) and part.site == "a":
            n_read += 1
            yield bytes(2**20)

    summing = Summing(endless, count, (KEY_ID,), 2, 1000, structlog.get_logger())
    made, _ = await summing.run(SumEvaluations(0, tuple(map(head, "abc"))))
    assert [part.site for part in made if isinstance(part, Evaluation)] == ["b", "c"]
    assert n_read == 2


async def test_other_keys_and_other_classes_than_most_are_left_out() -> None:
    parts = [head("a"), head("b"), head("c", key_id="unknown"), head("d", n_classes=3)]
    names, _, left_out = await summed(parts)
    assert (names, left_out) == ("ab", ["evaluation.c.0", "evaluation.d.0"])
    names, _, left_out = await summed([head("a"), head("b"), head("c", key_id="older")], key_ids=(KEY_ID, "older"))
    assert (names, left_out) == ("ab", ["evaluation.c.0"])


async def test_other_figures_are_summed_together_and_another_arrangement_is_left_out() -> None:
    parts = [
        head(site).model_copy(update={"n_classes": 0, "arrangement": arrangement, "figures": figures})
        for site, arrangement, figures in (
            ("a", 0, ("c_index", "loss")),
            ("b", 0, ("loss",)),
            ("c", 0, ()),
            ("d", 1, ("c_index",)),
            ("e", None, ()),
        )
    ]
    made, total = await Summing(nothing, count, (KEY_ID,), 2, 1000, structlog.get_logger()).run(
        SumEvaluations(0, tuple(parts))
    )
    assert total == 3
    assert sum_of("r", "north", made, PAYLOAD).figures == ("c_index", "loss")


async def test_a_sum_of_more_hospitals_than_there_are_is_left_out() -> None:
    parts = [evaluation_sum(region, n_sites=n_sites) for region, n_sites in (("north", 2), ("south", 6))]
    made, _ = await Summing(nothing, count, ("k",), 2, 5, structlog.get_logger()).run(SumEvaluations(0, tuple(parts)))
    assert made == parts[:1]


async def nothing(_part: EvaluationPart) -> AsyncGenerator[bytes, None]:
    yield b""


async def count(inputs: Sequence[tuple[bytes, ...]], _parts: Sequence[EvaluationPart]) -> int:
    return len(inputs)


def test_the_name_of_counts_cannot_be_made_without_them() -> None:
    name = payload_of("a", 3, SENT["a"]).payload_id
    assert name == payload_of("a", 3, SENT["a"]).payload_id  # of what is sent again
    again = encoder(BFV, PUBLIC).encode_counts(OWN["a"].flat())
    others = [payload_of("a", 3, again), payload_of("a", 4, SENT["a"]), payload_of("b", 3, SENT["a"])]
    assert len({name, *(other.payload_id for other in others)}) == 4


async def test_too_few_are_not_summed() -> None:
    assert await summed([head("a"), head("b")], min_sites=3) == ("", None, [])
    assert await summed([head("a"), head("b")], b=(b"no chunk",)) == ("", None, ["evaluation.b.0"])
    assert await summed([head("a", key_id="unknown")], min_sites=1) == ("", None, ["evaluation.a.0"])
