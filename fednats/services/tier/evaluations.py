"""Sum evaluations: select those that can be read and added, and describe their sum."""

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
"""Classes, arrangement and key id. Only evaluations with the same three can be added."""

Sum = TypeVar("Sum")

FEWEST_COUNTS, FEWEST_BITS = 512, 4
"""Lower bounds, for any settings: counts in a chunk (except the last one), and bits of a count."""

COUNT_BYTES, MORE_BYTES = 16, 2**20
"""Upper bounds in bytes, for any settings: one count, and the overhead of all chunks together."""


@dataclass(frozen=True)
class Loaded:
    """An evaluation and its chunks."""

    part: EvaluationPart
    chunks: tuple[bytes, ...]


Add = Callable[[Sequence[tuple[bytes, ...]], Sequence[EvaluationPart]], Awaitable[Sum]]
"""Called with the chunks of evaluations and their heads, all of one `Kind`; returns the sum."""


class Summing(Generic[Sum]):
    """Sums evaluations in the worker process.

    It leaves out, and logs, parts that are damaged, lost, too large or for none of ``key_ids``; sums of fewer than
    ``min_sites`` sites or of more than ``n_hospitals``; and parts whose `Kind` differs from that of most.
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
        """Return the evaluations that were summed, and the sum; ([], None) if they come from too few sites."""
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
        """Return its chunks. Raises RefusedError at more bytes than its counts can take, to bound the memory."""
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
        if len(part.payload.digests) > most:  # the chunks are read into memory, so limit them
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
        """Whether the worker process survives summing this one alone."""
        try:
            await self._sum([loaded])
        except WorkerDiedError as error:
            self._leave_out(loaded.part, error)
            return False
        except RefusedError:
            pass  # left out when all are summed
        return True

    def _leave_out(self, part: EvaluationPart, error: FednatsError) -> None:
        self._log.warning("evaluation_left_out", evaluation=evaluation_id(part), detail=str(error))


def _n_counts(part: EvaluationPart) -> int:
    """Return the largest number of counts that an evaluation can have."""
    return n_integers(part.n_classes, part.arrangement, FEWEST_BITS)


def _kind(part: EvaluationPart) -> Kind:
    return part.n_classes, part.arrangement, part.key_id


def payload_of(source: str, version: int, chunks: Sequence[bytes]) -> Payload:
    """Return the payload of the counts that a site or region sends for one version.

    Its name is derived from the counts, so nobody can guess it. Otherwise somebody could publish under the name first,
    and the stream would drop the counts as duplicates.
    """
    digests = tuple(map(wire.digest, chunks))
    name = wire.digest(b"".join([f"evaluation.{source}.{version}.".encode(), *digests])).hex()
    return Payload(payload_id=name, n_bytes=sum(map(len, chunks)), digests=digests)


def sum_of(run: str, region: str, parts: Sequence[EvaluationPart], payload: Payload) -> EvaluationSum:
    """Return the head of the sum of ``parts``: one or more evaluations of the same version."""
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
    """Count the test cases in ``parts``."""
    return min(sum(part.n_samples for part in parts), MAX_COUNT)


def figures_of(parts: Sequence[EvaluationPart]) -> tuple[str, ...]:
    """Return the names of the figures summed in ``parts``, which must have the same arrangement."""
    arrangement = parts[0].arrangement
    return () if arrangement is None else known_names([part.figures for part in parts], arrangement)


def mean_metrics(parts: Sequence[EvaluationPart]) -> dict[str, float]:
    """Return the means, weighted by number of samples, of the metrics common to all ``parts``."""
    n_samples = sum(part.n_samples for part in parts)
    names = set.intersection(*(set(part.metrics) for part in parts)) if n_samples else set()
    return {name: sum(part.metrics[name] * part.n_samples for part in parts) / n_samples for name in sorted(names)}


def evaluations_summed(
    version: int, parts: Sequence[EvaluationPart], pooled: PooledEvaluation | None
) -> EvaluationsSummed:
    """Return the coordinator's figures for ``parts``. ``pooled`` holds their decrypted sums, None if too few sites."""
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
