"""Evaluations that are summed: whose chunks can be read and added, and what is known of all of them together."""

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fednats import wire
from fednats.errors import FednatsError, Reason, RefusedChunkError, RefusedError
from fednats.learning.figures import known_names, n_integers
from fednats.learning.scores import pooled_names
from fednats.messages import MAX_COUNT, Evaluation, EvaluationSum, Payload
from fednats.protocol.events import EvaluationsSummed, SumEvaluations, evaluation_id
from fednats.services.daemon.answers import PooledEvaluation
from fednats.services.daemon.worker import WorkerDiedError
from fednats.services.tier.inbox import VanishedError

EvaluationPart = Evaluation | EvaluationSum
Read = Callable[[EvaluationPart], AsyncGenerator[bytes, None]]
Kind = tuple[int, int | None, str]
"""Classes, arrangement and key: only what has the same of all three adds up."""

Sum = TypeVar("Sum")

FEWEST_COUNTS, FEWEST_BITS = 512, 4
"""Counts in a chunk, the last one apart, and bits of a count: whatever the settings are, no fewer."""

COUNT_BYTES, MORE_BYTES = 16, 2**20
"""Bytes that a count takes, and what comes on top of all: whatever the settings are, no more."""


@dataclass(frozen=True)
class Loaded:
    """An evaluation and its chunks."""

    part: EvaluationPart
    chunks: tuple[bytes, ...]


Add = Callable[[Sequence[tuple[bytes, ...]], Sequence[EvaluationPart]], Awaitable[Sum]]
"""Takes the chunks of evaluations, and their heads: all have the same classes, arrangement and key."""


class Summing(Generic[Sum]):
    """Sums evaluations in the worker process.

    Whatever cannot be summed is left out, and said to be: a part that is damaged, lost, for none of ``key_ids``, of fewer
    than ``min_sites`` sites or of more than there are, or of other classes, in another arrangement or for another key than
    most.
    """

    def __init__(
        self,
        read: Read,
        add: Add[Sum],
        key_ids: Collection[str],
        min_sites: int,
        n_hospitals: int,
        log: Any,
    ) -> None:
        self._read = read
        self._add = add
        self._key_ids = key_ids
        self._min_sites = min_sites
        self._n_hospitals = n_hospitals
        self._log = log

    async def run(self, summing: SumEvaluations) -> tuple[list[EvaluationPart], Sum | None]:
        """Return the evaluations that were summed, and the sum; none where they are of too few sites."""
        loaded = await self._load(summing)
        while sites_of([each.part for each in loaded]) >= self._min_sites:
            try:
                return [each.part for each in loaded], await self._sum(loaded)
            except RefusedChunkError as error:
                self._leave_out(loaded.pop(error.index).part, error)
            except WorkerDiedError:
                loaded = [each for each in loaded if await self._survives(each)]
        return [], None

    async def _load(self, summing: SumEvaluations) -> list[Loaded]:
        kinds = Counter(_kind(part) for part in summing.parts if part.key_id in self._key_ids)
        kind = kinds.most_common(1)[0][0] if kinds else None
        loaded = []
        for part in summing.parts:
            try:
                self._check(part, kind)
                loaded.append(Loaded(part, await self._read_all(part)))
            except (RefusedError, VanishedError) as error:
                self._leave_out(part, error)
        return loaded

    async def _read_all(self, part: EvaluationPart) -> tuple[bytes, ...]:
        """Return its chunks; as many bytes as can be meant are in memory, however many its sender has stored."""
        most, n_bytes, read = _n_counts(part) * COUNT_BYTES + MORE_BYTES, 0, []
        async with aclosing(self._read(part)) as chunks:
            async for chunk in chunks:
                n_bytes += len(chunk)
                if n_bytes > most:
                    raise RefusedError(Reason.OVERSIZED, f"its chunks are of more than {most} bytes")
                read.append(chunk)
        return tuple(read)

    def _check(self, part: EvaluationPart, kind: Kind | None) -> None:
        if part.key_id not in self._key_ids:
            known = " or ".join(self._key_ids)
            raise RefusedError(Reason.WRONG_KEY, f"encrypted for key {part.key_id}, this is {known}")
        if _kind(part) != kind:
            raise RefusedError(Reason.WRONG_SHAPE, f"classes, arrangement and key are {_kind(part)}, of most {kind}")
        if not part.n_classes and part.arrangement is None:
            raise RefusedError(Reason.WRONG_SHAPE, "neither classes nor figures are counted")
        most = _n_counts(part) // FEWEST_COUNTS + 1
        if len(part.payload.digests) > most:  # they are read into memory: no more than can be meant
            raise RefusedError(Reason.OVERSIZED, f"{len(part.payload.digests)} chunks, its counts have at most {most}")
        least = max(self._min_sites, part.min_sites)
        if isinstance(part, EvaluationSum) and part.n_sites < least:
            raise RefusedError(Reason.TOO_FEW_SITES, f"a sum of {part.n_sites} sites, at least {least} must be")
        if isinstance(part, EvaluationSum) and part.n_sites > self._n_hospitals:
            raise RefusedError(
                Reason.OVERWEIGHT, f"a sum of {part.n_sites} sites; the federation has {self._n_hospitals}"
            )

    async def _sum(self, loaded: Sequence[Loaded]) -> Sum:
        return await self._add([each.chunks for each in loaded], [each.part for each in loaded])

    async def _survives(self, loaded: Loaded) -> bool:
        """Whether summing this one alone leaves the worker process alive."""
        try:
            await self._sum([loaded])
        except WorkerDiedError as error:
            self._leave_out(loaded.part, error)
            return False
        except RefusedError:
            pass  # refused by name when all are summed
        return True

    def _leave_out(self, part: EvaluationPart, error: FednatsError) -> None:
        self._log.warning("evaluation_left_out", evaluation=evaluation_id(part), detail=str(error))


def _n_counts(part: EvaluationPart) -> int:
    """Return how many counts an evaluation has at most."""
    return n_integers(part.n_classes, part.arrangement, FEWEST_BITS)


def _kind(part: EvaluationPart) -> Kind:
    return part.n_classes, part.arrangement, part.key_id


def payload_of(source: str, version: int, chunks: Sequence[bytes]) -> Payload:
    """Name and describe the counts of one version that a site or region sends: the same name for the same counts.

    It follows from the counts: with a name that others can make in advance they could send something under it first, and
    the stream would drop the counts as sent before.
    """
    digests = tuple(map(wire.digest, chunks))
    name = wire.digest(b"".join([f"evaluation.{source}.{version}.".encode(), *digests])).hex()
    return Payload(payload_id=name, n_bytes=sum(map(len, chunks)), digests=digests)


def sum_of(run: str, region: str, parts: Sequence[EvaluationPart], payload: Payload) -> EvaluationSum:
    """Return the head of the sum of ``parts``, which are of one version and at least one."""
    return EvaluationSum(
        run=run,
        region=region,
        version=parts[0].version,
        key_id=parts[0].key_id,
        n_sites=sites_of(parts),
        n_classes=parts[0].n_classes,
        arrangement=parts[0].arrangement,
        figures=figures_of(parts),
        n_samples=cases_of(parts),
        metrics=mean_metrics(parts),
        min_sites=max(part.min_sites for part in parts),
        payload=payload,
    )


def sites_of(parts: Sequence[EvaluationPart]) -> int:
    """Count the distinct sites in ``parts``."""
    return min(sum(1 if isinstance(part, Evaluation) else part.n_sites for part in parts), MAX_COUNT)


def cases_of(parts: Sequence[EvaluationPart]) -> int:
    """Count the test cases that metrics are of."""
    return min(sum(part.n_samples for part in parts), MAX_COUNT)


def figures_of(parts: Sequence[EvaluationPart]) -> tuple[str, ...]:
    """Return the names of the figures that are summed in ``parts``, which are of one arrangement."""
    arrangement = parts[0].arrangement
    return () if arrangement is None else known_names([part.figures for part in parts], arrangement)


def mean_metrics(parts: Sequence[EvaluationPart]) -> dict[str, float]:
    """Return the means, weighted by number of samples, of the metrics that all of ``parts`` give."""
    n_samples = sum(part.n_samples for part in parts)
    names = set.intersection(*(set(part.metrics) for part in parts)) if n_samples else set()
    return {name: sum(part.metrics[name] * part.n_samples for part in parts) / n_samples for name in sorted(names)}


def evaluations_summed(
    version: int, parts: Sequence[EvaluationPart], pooled: PooledEvaluation | None
) -> EvaluationsSummed:
    """Return what is known at the root of ``parts``, given what was decrypted of them; of none where they were too few."""
    if pooled is None:
        return EvaluationsSummed(version=version, n_sites=0, n_samples=0)
    metrics = {**mean_metrics(parts), **pooled.means, **pooled.metrics}
    names = dict.fromkeys((*pooled_names(parts[0].n_classes), *figures_of(parts)))
    return EvaluationsSummed(
        version=version,
        n_sites=sites_of(parts),
        n_samples=pooled.n_samples,
        metrics=metrics,
        means=tuple(name for name in metrics if name not in pooled.metrics),
        undefined=tuple(name for name in names if name not in metrics),
    )
