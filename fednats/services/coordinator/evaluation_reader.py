"""Read the figures out of the regions' sums of evaluations."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fednats.protocol.events import EvaluationsSummed, SumEvaluations, VersionAnnounced
from fednats.services.daemon.answers import PooledEvaluation
from fednats.services.daemon.identity import Identity
from fednats.services.daemon.worker import Worker
from fednats.services.tier.evaluations import EvaluationPart, Read, Summing, evaluations_summed

if TYPE_CHECKING:
    from fednats.services.coordinator.worker import CoordinatorWorker


class EvaluationReader:
    """Has sums decrypted in the worker process.

    It holds ``lock`` meanwhile: a bad sum may end the process, and with it the mean that another job keeps there.
    """

    def __init__(
        self, identity: Identity, read: Read, worker: "Worker[CoordinatorWorker]", lock: asyncio.Lock, log: Any
    ) -> None:
        self._identity = identity
        self._read = read
        self._worker = worker
        self._lock = lock
        self._log = log
        self.cases: dict[str, Any] = {}
        """Confusion matrix and ROC curves of the version read last, over all test cases pooled."""

    async def read(self, command: SumEvaluations, current: VersionAnnounced) -> EvaluationsSummed:
        """Decrypt the regions' sums for one version. Versions of an earlier run are not read."""
        least = current.settings.min_sites

        async def pool(inputs: Sequence[tuple[bytes, ...]], parts: Sequence[EvaluationPart]) -> PooledEvaluation:
            async with self._lock:
                pooled: PooledEvaluation = await self._worker.call("pool", inputs, parts, least)
            return pooled

        key_ids = (current.key_id, *current.older_key_ids)
        summing = Summing(self._read, pool, key_ids, least, self._identity.n_hospitals, self._log)
        is_of_this_run = command.version >= current.opening.first_version
        parts, pooled = await summing.run(command) if is_of_this_run else ([], None)
        if pooled is not None:
            self.cases = {"version": command.version, "confusion": pooled.confusion, "roc": pooled.roc}
        return evaluations_summed(command.version, parts, pooled)
