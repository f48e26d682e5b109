"""What an aggregator does in its worker process: add ciphertexts."""

from collections.abc import Sequence
from dataclasses import dataclass

from fednats.config import AggregatorSettings, DeltaSettings
from fednats.delta.sum import summer


@dataclass(frozen=True)
class Fit:
    """What contributions to a run must look like, and how much fits into one sum made here."""

    key_id: str
    n_chunks: int
    max_total_weight: int
    capacity: int


class AggregatorWorker:
    """Holds the public key."""

    def __init__(self, settings: AggregatorSettings) -> None:
        self._depth = settings.depth
        self._public_key = None if settings.public_key_file is None else settings.public_key_file.read_bytes()

    def fit(self, delta: DeltaSettings, n_parameters: int) -> Fit:
        """Return what contributions must look like for a model of ``n_parameters``."""
        add = summer(delta, self._public_key)
        levels = max(1, delta.tiers - self._depth + 1)
        return Fit(
            key_id=add.key_id,
            n_chunks=-(-n_parameters // add.values_per_chunk),
            max_total_weight=add.max_total_weight,
            capacity=int(add.max_total_weight ** (levels / delta.tiers)),
        )

    def weighted_sum(
        self, delta: DeltaSettings, chunks: Sequence[bytes], weights: Sequence[int], total_weight: int
    ) -> bytes:
        """Add the same chunk of several contributions, each times its integer weight."""
        return summer(delta, self._public_key).weighted_sum(chunks, weights, total_weight)
