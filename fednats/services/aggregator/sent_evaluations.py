"""Send a region's sums of evaluations: one at a time, for the newest complete version."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from fednats.messages import Evaluation, EvaluationSum
from fednats.protocol.collector import Collector
from fednats.protocol.events import EvaluationsSummed, SumEvaluations, evaluation_id
from fednats.services.aggregator.above import Above
from fednats.services.aggregator.published import Published
from fednats.services.daemon.answers import Fit
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.recorder import Recorder, entry_of
from fednats.services.daemon.worker import Worker
from fednats.services.tier.compositions import Compositions
from fednats.services.tier.evaluations import EvaluationPart, Read, Summing, cases_of, payload_of, sites_of, sum_of

if TYPE_CHECKING:
    from fednats.services.aggregator.worker import AggregatorWorker


class SentEvaluations:
    """Sums the test counts of sites and regions below, and sends the sums up.

    A sum of evaluations is as large as the sum of a small model. On a thin link, one for each version would crowd out
    the sums of updates. So a version that still waits when a newer one is complete is skipped.
    """

    def __init__(
        self,
        identity: Identity,
        machine: Collector,
        published: Published,
        above: Above,
        read: Read,
        worker: "Worker[AggregatorWorker]",
        recorder: Recorder,
        compositions: Compositions,
        log: Any,
    ) -> None:
        self._identity = identity
        self._machine = machine
        self._published = published
        self._above = above
        self._read = read
        self._worker = worker
        self._recorder = recorder
        self._compositions = compositions
        self._log = log
        self._waiting: list[SumEvaluations] = []
        self._complete = asyncio.Event()

    def add(self, command: SumEvaluations) -> None:
        """Queue ``command``; it is skipped if a newer version overtakes it."""
        self._waiting.append(command)
        self._complete.set()

    async def send(
        self,
        fit_for: Callable[[int], Awaitable[Fit | None]],
        feed: Callable[[EvaluationsSummed], Awaitable[None]],
    ) -> None:
        """Sum and send, forever. What was not sent when the daemon stopped is outstanding after its restart.

        Args:
            fit_for: returns the `Fit` of a version; None if its run is over.
            feed: takes in the outcome for each version.
        """
        while True:
            await self._complete.wait()
            self._complete.clear()
            if not self._waiting or not await self._above.has_newest(self._published.evaluations, "evaluations_wait"):
                continue
            commands, self._waiting = self._waiting, []
            newest = max(commands, key=lambda command: command.version)
            for command in commands:
                if command is not newest:
                    self._log.info("version_not_evaluated", version=command.version, overtaken_by=newest.version)
                    await feed(_nothing_of(command))
            fit = await fit_for(newest.version)
            await feed(_nothing_of(newest) if fit is None else await self._send(newest, fit))

    async def _send(self, command: SumEvaluations, fit: Fit) -> EvaluationsSummed:
        """Send one sum per version: a second one, of other sites, would reveal the difference to the node above."""
        published = await self._published.newest(self._published.evaluations, EvaluationSum)
        if published is not None and published.version == command.version:  # killed before journalling that
            n_sites, n_samples = published.n_sites, published.n_samples
            return EvaluationsSummed(version=command.version, n_sites=n_sites, n_samples=n_samples)
        parts, chunks = await self._sum(command, fit)
        spoilt_by = tuple(
            evaluation_id(part) for part in command.parts if isinstance(part, Evaluation) and part not in parts
        )
        if spoilt_by:
            return EvaluationsSummed(version=command.version, n_sites=0, n_samples=0, spoilt_by=spoilt_by)
        if parts:
            region = self._published.region
            head = sum_of(self._published.run, region, parts, payload_of(region, command.version, chunks))
            await self._recorder.record(entry_of("evaluation_sum", head, version=head.version, payload=head.payload))
            await self._compositions.write_blocks(self._machine.evaluations.blocks)
            await self._published.publish(self._published.evaluations, head, lambda: chunks)
            if published is not None and published.payload.payload_id != head.payload.payload_id:
                await self._published.drop(published.payload.payload_id)  # the node above has copied it
        return EvaluationsSummed(version=command.version, n_sites=sites_of(parts), n_samples=cases_of(parts))

    async def _sum(self, command: SumEvaluations, fit: Fit) -> tuple[list[EvaluationPart], tuple[bytes, ...]]:
        current = self._machine.current
        assert current is not None  # noqa: S101 - evaluations are of versions that were announced here

        async def add(inputs: Sequence[tuple[bytes, ...]], parts: Sequence[EvaluationPart]) -> tuple[bytes, ...]:
            n_sites, like = [sites_of([part]) for part in parts], parts[0]
            summed: tuple[bytes, ...] = await self._worker.call(
                "sum_counts", fit, inputs, n_sites, like.n_classes, like.arrangement
            )
            return summed

        key_ids = (current.key_id, *current.older_key_ids)
        summing = Summing(self._read, add, key_ids, current.settings.min_sites, self._identity.n_hospitals, self._log)
        parts, summed = await summing.run(command)
        return parts, summed or ()


def _nothing_of(command: SumEvaluations) -> EvaluationsSummed:
    """Return the event that says that no sum was sent for the version."""
    return EvaluationsSummed(version=command.version, n_sites=0, n_samples=0)
