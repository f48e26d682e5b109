"""Notes on the bus that list the parts of a sum or a version, and the combination that can be read back from a note."""

from collections.abc import Mapping

from fednats.messages import MAX_MASS, Aggregate, ComposedPart, Composition, Payload, Update
from fednats.protocol.events import Combination, Part


def composition_of(
    run: str, node: str, combination: Combination, previous: str, capacity: int | None, **of_version: object
) -> Composition:
    """Return the note that ``node`` publishes about ``combination``.

    Args:
        run: the node's run.
        node: a region, or the hub.
        combination: the one being made.
        previous: id of the combination made before it; empty for the first.
        capacity: largest total weight of a sum made here; None where sums are not made of integers.
        of_version: at the hub, ``norms``, ``quarantined``, ``grid`` and ``weights_digest``, as in `Composition`.
    """
    parts = tuple(
        ComposedPart(head=_without_digests(part.head), mass=min(part.mass, MAX_MASS), staleness=part.staleness)
        for part in combination.parts
    )
    fields: Mapping[str, object] = {
        "run": run,
        "node": node,
        "made_by": combination.combination_id,
        "previous": previous,
        "version": max(combination.version, 0),
        "parts": parts,
        "scale": combination.scale,
        "n_sites": combination.n_sites,
        "capacity": capacity,
        **of_version,
    }
    return Composition.model_validate(fields)


def combination_of(composition: Composition) -> Combination:
    """Return the noted combination. Its heads name their payloads, without the digests of the chunks."""
    parts = tuple(Part(part.head, part.mass, part.staleness) for part in composition.parts)
    return Combination(composition.made_by, composition.version, parts, composition.scale, composition.n_sites)


def without_digests(payload: Payload) -> Payload:
    """Return ``payload`` without digests, as noted: a large one has thousands of chunks."""
    return payload.model_copy(update={"digests": ()})


def _without_digests(head: Update | Aggregate) -> Update | Aggregate:
    return head.model_copy(update={"payload": without_digests(head.payload)})
