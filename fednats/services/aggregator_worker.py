"""What an aggregator does in its worker process: add ciphertexts."""

from collections.abc import Sequence

from fednats.config import AggregatorSettings, DeltaSettings
from fednats.delta.sum import summer
from fednats.errors import Reason, RefusedError
from fednats.learning.scores import n_counts
from fednats.services.answers import Fit
from fednats.services.keys import key_id_of, read_key


class AggregatorWorker:
    """Holds the public key."""

    def __init__(self, settings: AggregatorSettings) -> None:
        self._depth = settings.depth
        self._public_key = read_key(settings.public_key_file, "public_key_file")

    def fit(self, delta: DeltaSettings, n_parameters: int) -> Fit:
        """Return what contributions to a run over a model of ``n_parameters`` must look like."""
        if self._public_key is not None and delta.cipher == "none":
            raise RefusedError(Reason.POLICY, "the run is not encrypted, but this region has a public_key_file")
        key_id = key_id_of(lambda: summer(delta, self._public_key).key_id)
        add = summer(delta, self._public_key)
        levels = max(1, delta.tiers - self._depth + 1)
        return Fit(
            delta=delta,
            n_parameters=n_parameters,
            key_id=key_id,
            n_chunks=-(-n_parameters // add.values_per_chunk),
            max_total_weight=add.max_total_weight,
            capacity=int(add.max_total_weight ** (levels / delta.tiers)),
        )

    def sum_counts(
        self, fit: Fit, inputs: Sequence[Sequence[bytes]], n_sites: int, n_classes: int
    ) -> tuple[bytes, ...]:
        """Add the counts of several evaluations, of ``n_sites`` sites together."""
        return summer(fit.delta, self._public_key).sum_counts(inputs, n_sites, n_counts(n_classes))

    def weighted_sum(
        self, fit: Fit, position: int, chunks: Sequence[bytes], weights: Sequence[int], total_weight: int
    ) -> bytes:
        """Add the chunk at ``position`` of several contributions, each times its integer weight."""
        add = summer(fit.delta, self._public_key)
        n_values = min(add.values_per_chunk, fit.n_parameters - position * add.values_per_chunk)
        return add.weighted_sum(chunks, weights, total_weight, n_values)
