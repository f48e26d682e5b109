"""The aggregator's worker process: add ciphertexts."""

from collections.abc import Sequence
from functools import partial

from fednats.config import AggregationSettings, AggregatorSettings, DeltaSettings
from fednats.crypto import keystream
from fednats.crypto.signing import Signer
from fednats.delta.scheme import count_bits
from fednats.delta.sum import Summer, summer
from fednats.errors import Reason, RefusedError
from fednats.learning.figures import n_integers
from fednats.services.daemon.answers import Fit
from fednats.services.daemon.keys import checked_key_id, held, read_keys

DITHER = b"dither of sums"


class AggregatorWorker:
    """Holds the public keys, and the secret from which the dither of this region's sums is derived."""

    def __init__(self, settings: AggregatorSettings) -> None:
        self._depth = settings.depth
        self._dither_secret = Signer.read(settings.bus.nkey_seed_file, "bus.nkey_seed_file").secret(DITHER)
        self._keys = read_keys(settings.public_key_file, settings.older_public_key_file, "public_key_file")

    def fit(self, delta: DeltaSettings, aggregation: AggregationSettings, n_parameters: int, announced: str) -> Fit:
        """Return what contributions to a run over a model of ``n_parameters`` must look like.

        ``announced`` is the id of the key that sites encrypt for.

        Raises:
            RefusedError: ``policy``: the run is not encrypted, but this region has a key; ``wrong_key``: the key does
                not fit ``delta``.
        """
        public_key = held(self._keys, announced)
        if public_key is not None and delta.cipher == "none":
            raise RefusedError(Reason.POLICY, "the run is not encrypted, but this region has a public_key_file")
        key_id = checked_key_id(lambda: summer(delta, public_key).key_id)
        add = summer(delta, public_key)
        levels = max(1, delta.tiers - self._depth + 1)
        return Fit(
            delta=delta,
            aggregation=aggregation,
            n_parameters=n_parameters,
            key_id=key_id,
            n_chunks=-(-n_parameters // add.values_per_chunk),
            max_total_weight=add.max_total_weight,
            capacity=int(add.max_total_weight ** (levels / delta.tiers)),
        )

    def sum_counts(
        self,
        fit: Fit,
        inputs: Sequence[Sequence[bytes]],
        n_sites: Sequence[int],
        n_classes: int,
        arrangement: int | None,
    ) -> tuple[bytes, ...]:
        """Add the counts of several evaluations; ``n_sites`` is the number of sites in each."""
        n = n_integers(n_classes, arrangement, count_bits(fit.delta))
        return summer(fit.delta, held(self._keys, fit.key_id)).sum_counts(inputs, n_sites, n)

    def weighted_sum(
        self,
        fit: Fit,
        position: int,
        chunks: Sequence[bytes],
        weights: Sequence[int],
        carried: Sequence[int],
        combination_id: str,
    ) -> bytes:
        """Add the chunk at ``position`` of several contributions, each times its integer weight.

        All must be encrypted for the same key, of either epoch: adding uses only the key's parameters, which all epochs
        share. ``carried`` is the total weight already in each contribution: 1 for an update. A combination always gets
        the same dither, so a sum that is made again after a crash is the same to the bit.
        """
        add = summer(fit.delta, held(self._keys, fit.key_id))
        n_values = _n_values(fit, add, position)
        total_weight = sum(weight * size for weight, size in zip(weights, carried, strict=True))
        dither = partial(keystream.uniform, self._dither_secret, f"{combination_id}/{position}")
        return add.weighted_sum(chunks, weights, total_weight, n_values, carried, dither)

    def squares(self, fit: Fit, position: int, chunks: Sequence[bytes]) -> tuple[float, ...]:
        """Return the sum of squares of the integers in the chunk at ``position`` of several updates."""
        add = summer(fit.delta, held(self._keys, fit.key_id))
        return add.squares(chunks, _n_values(fit, add, position))

    def robust_sum(
        self, fit: Fit, position: int, chunks: Sequence[bytes], weights: Sequence[int], factors: Sequence[float]
    ) -> bytes:
        """Sum the chunk at ``position`` of several updates by the run's robust rule."""
        add = summer(fit.delta, held(self._keys, fit.key_id))
        return add.robust_sum(chunks, weights, _n_values(fit, add, position), fit.aggregation, factors)


def _n_values(fit: Fit, add: Summer, position: int) -> int:
    return min(add.values_per_chunk, fit.n_parameters - position * add.values_per_chunk)
