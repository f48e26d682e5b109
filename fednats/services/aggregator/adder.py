"""Add the encrypted contributions of a combination, chunk by chunk."""

import math
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from typing import TYPE_CHECKING

from fednats.delta.robust import bound_norms
from fednats.errors import Reason, RefusedChunkError, RefusedError
from fednats.messages import Aggregate, Update
from fednats.protocol.events import Combination, Part, contribution_id
from fednats.protocol.sums import carried_weight
from fednats.services.daemon.answers import Fit
from fednats.services.daemon.worker import Worker, WorkerDiedError

if TYPE_CHECKING:
    from fednats.services.aggregator.worker import AggregatorWorker


class PartRefusedError(RefusedError):
    """One contribution of a combination turned out to be bad when it was read or added."""

    def __init__(self, part: Part, reason: Reason, detail: str) -> None:
        super().__init__(reason, detail)
        self.part_id = contribution_id(part.head)


class Adder:
    """Adds the parts of one combination, each times its integer weight, in the worker process."""

    def __init__(
        self,
        worker: "Worker[AggregatorWorker]",
        fit: "Fit",
        combination: Combination,
        weights: tuple[int, ...],
        read: Callable[[Update | Aggregate], AsyncGenerator[bytes, None]],
    ) -> None:
        self._worker = worker
        self._fit = fit
        self._combination_id = combination.combination_id
        self._parts = combination.parts
        self._weights = weights
        self._read = read
        self._carried = tuple(carried_weight(part) for part in self._parts)
        self._of_updates = all(isinstance(part.head, Update) for part in self._parts)
        self._factors: tuple[float, ...] = ()

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """Yield the chunks of the sum. One chunk of each part is in memory at a time.

        Raises:
            PartRefusedError: a part is bad.
            VanishedError: the stream has lost a part.
        """
        if self._fit.aggregation.robust == "norm_bound" and self._of_updates:
            self._factors = bound_norms(await self._norms())
        async with aclosing(self._positions()) as positions:
            async for position, chunks in positions:
                yield await self._add(position, chunks)

    async def _positions(self) -> AsyncGenerator[tuple[int, list[bytes]], None]:
        """Yield the chunks of all parts, position by position."""
        async with AsyncExitStack() as stack:
            readers = [await stack.enter_async_context(aclosing(self._read(part.head))) for part in self._parts]
            for position in range(len(self._parts[0].head.payload.digests)):
                chunks = [await self._next(part, reader) for part, reader in zip(self._parts, readers, strict=True)]
                yield position, chunks

    async def _norms(self) -> list[float]:
        """Read all parts once and return the L2 norm of each, in steps of their common grid."""
        squares = [0.0] * len(self._parts)
        async with aclosing(self._positions()) as positions:
            async for position, chunks in positions:
                try:
                    more = await self._worker.call("squares", self._fit, position, chunks)
                except RefusedChunkError as error:
                    raise PartRefusedError(self._parts[error.index], error.reason, error.detail) from error
                squares = [known + new for known, new in zip(squares, more, strict=True)]
        return [math.sqrt(value) for value in squares]

    async def _next(self, part: Part, reader: AsyncGenerator[bytes, None]) -> bytes:
        try:
            return await anext(reader)
        except RefusedError as error:
            raise PartRefusedError(part, error.reason, error.detail) from error

    async def _add(self, position: int, chunks: list[bytes]) -> bytes:
        try:
            return await self._weighted_sum(position, chunks, self._weights, self._carried)
        except RefusedError as error:
            index = error.index if isinstance(error, RefusedChunkError) else 0
            raise PartRefusedError(self._parts[index], error.reason, error.detail) from error
        except WorkerDiedError:
            for part, chunk in zip(self._parts, chunks, strict=True):
                await self._survive(part, position, chunk)
            return await self._weighted_sum(position, chunks, self._weights, self._carried)

    async def _survive(self, part: Part, position: int, chunk: bytes) -> None:
        """Refuse the part whose chunk, added alone, ends the worker process."""
        try:
            await self._weighted_sum(position, [chunk], (1,), (carried_weight(part),))
        except WorkerDiedError as error:
            raise PartRefusedError(part, Reason.CIPHERTEXT, str(error)) from error

    async def _weighted_sum(
        self, position: int, chunks: list[bytes], weights: tuple[int, ...], carried: tuple[int, ...]
    ) -> bytes:
        summed: bytes
        if self._fit.aggregation.robust != "none" and self._of_updates:
            summed = await self._worker.call("robust_sum", self._fit, position, chunks, weights, self._factors)
        else:  # regions below have applied the robust rule to their updates already: add their sums as usual
            summed = await self._worker.call(
                "weighted_sum", self._fit, position, chunks, weights, carried, self._combination_id
            )
        return summed
