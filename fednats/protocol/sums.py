"""The head of a sum, computed from its parts: by the region that makes the sum, and by anyone who verifies it."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from fednats.messages import MAX_COUNT, MAX_MASS, MIN_MASS, Aggregate, Payload, Update
from fednats.protocol.events import Combination, Part
from fednats.protocol.weights import apportion

MAX_SHARE = 0.9
"""Largest share of a sum's mass that one site's updates may have, so that no single site dominates a sum."""


def weigh(combination: Combination, capacity: int) -> tuple[int, ...]:
    """Return the integer weight of each part. Weights times `carried_weight`, summed, are at most ``capacity``."""
    return apportion(_masses(combination.parts), [carried_weight(part) for part in combination.parts], capacity)


def _masses(parts: Sequence[Part]) -> list[float]:
    """Return the mass of each part. If a site exceeds `MAX_SHARE`, its parts' masses are lowered in proportion."""
    of_sites: defaultdict[str, float] = defaultdict(float)
    for part in parts:
        if isinstance(part.head, Update):
            of_sites[part.head.site] += part.mass
    total = sum(part.mass for part in parts)
    for site, mass in of_sites.items():  # at most one site can exceed MAX_SHARE
        most = (total - mass) * MAX_SHARE / (1 - MAX_SHARE)
        if 0 < most < mass:
            return [part.mass * (most / mass if _is_of(part, site) else 1.0) for part in parts]
    return [part.mass for part in parts]


def _is_of(part: Part, site: str) -> bool:
    return isinstance(part.head, Update) and part.head.site == site


def carried_weight(part: Part) -> int:
    """Return the total weight already in a part: 1 for an update."""
    return 1 if isinstance(part.head, Update) else part.head.total_weight


def head_of(run: str, region: str, combination: Combination, weights: Sequence[int], payload: Payload) -> Aggregate:
    """Return the head of the sum that ``region`` makes of ``combination`` with these integer weights."""
    heads = [part.head for part in combination.parts]
    return Aggregate(
        run=run,
        region=region,
        aggregate_id=combination.combination_id,
        model_version=combination.version,
        grid_id=heads[0].grid_id,
        key_id=heads[0].key_id,
        total_weight=sum(
            weight * carried_weight(part) for weight, part in zip(weights, combination.parts, strict=True)
        ),
        mass=max(min(sum(part.mass for part in combination.parts), MAX_MASS), MIN_MASS),
        n_sites=min(combination.n_sites, MAX_COUNT),
        n_updates=_count(1 if isinstance(head, Update) else head.n_updates for head in heads),
        n_samples=_count(head.n_samples for head in heads),
        saturated=_count(head.saturated for head in heads),
        staleness_sum=_count(_staleness_sum(part) for part in combination.parts),
        staleness_max=min(max(_staleness_max(part) for part in combination.parts), MAX_COUNT),
        min_sites=max(head.min_sites for head in heads),
        payload=payload,
    )


def _count(figures: Iterable[int]) -> int:
    """Add up reported figures, capped at `MAX_COUNT`."""
    return min(sum(figures), MAX_COUNT)


def _staleness_sum(part: Part) -> int:
    if isinstance(part.head, Update):
        return part.staleness
    return part.head.staleness_sum + part.staleness * part.head.n_updates


def _staleness_max(part: Part) -> int:
    return part.staleness + (0 if isinstance(part.head, Update) else part.head.staleness_max)
