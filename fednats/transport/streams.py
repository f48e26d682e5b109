"""Streams and buckets of a run: which service makes each, and with which limits.

Most functions return the streams or buckets that a service ensures at its start, with `Bus.ensure_stream` and
`Bus.ensure_bucket`. When full, a stream of models, compositions, receipts or rejects drops its oldest messages. All
others refuse new messages, and the sender keeps them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fednats import permissions, subjects
from fednats.subjects import HUB

GIB = 2**30
NANOSECONDS = 10**9

PRESENCE_TTL_S = 15.0
"""A service that has not renewed its presence for this long counts as gone; renew three times as often."""


@dataclass(frozen=True)
class Limits:
    """Limits of one stream."""

    max_bytes: int
    max_age_s: int
    duplicate_window_s: int = 3600
    """How long the stream remembers a message id; a message sent again meanwhile is stored once."""
    max_messages: int = -1
    """-1 means no limit."""
    max_messages_per_subject: int = -1


MODELS = Limits(max_bytes=8 * GIB, max_age_s=365 * 86400)
UPDATES = Limits(max_bytes=8 * GIB, max_age_s=7 * 86400, max_messages=2**17)
"""Limits for one site. An update has at most 2^16 chunks, so nearly two of the largest fit.

Messages are limited because each costs the server memory, however small.
"""

AGGREGATES = Limits(max_bytes=16 * GIB, max_age_s=7 * 86400)
INBOX = Limits(max_bytes=16 * GIB, max_age_s=7 * 86400, max_messages=2**18)
"""Limits for one region, at the node above."""

COMPOSITIONS = Limits(max_bytes=GIB // 2, max_age_s=365 * 86400, max_messages=200_000)
RECEIPTS = Limits(max_bytes=GIB // 16, max_age_s=365 * 86400, max_messages_per_subject=1)
REJECTS = Limits(max_bytes=GIB, max_age_s=30 * 86400, max_messages_per_subject=16)
"""Each subject is for one sender and one reason, so a flood of one kind pushes out no rejects of another."""


@dataclass(frozen=True)
class Origin:
    """A stream that another stream copies; ``api`` and ``deliver`` lead to its domain or account."""

    stream: str
    api: str | None = None
    deliver: str = ""
    pulse: str | None = None
    """Subject of the pulse that arrives from there while the link is up; None if it is on the same server."""
    says_limit: bool = False
    """Whether the pulse says how large the run's messages are; only that of the node above does."""

    def config(self) -> Mapping[str, Any]:
        """Return the server's JSON for this source.

        It copies from the first message; by default the server might start at the newest of other origins.
        """
        config: dict[str, Any] = {"name": self.stream, "opt_start_seq": 1}
        if self.api is not None:
            config["external"] = {"api": self.api, "deliver": self.deliver}
        return config


@dataclass(frozen=True)
class StreamSpec:
    """One stream, which takes ``subjects`` or copies its ``sources``."""

    name: str
    limits: Limits
    discard: Literal["old", "new"]
    subjects: tuple[str, ...] = ()
    sources: tuple[Origin, ...] = ()
    announce: tuple[str, str] | None = None
    """Subject filter of stored messages that are also announced (headers only), and the subject to announce them on."""
    pulse: str | None = None
    """Subject on which the stream's maker publishes regularly, for those who copy it over a link."""
    api: str | None = None
    """API prefix of its JetStream, if that is in another account."""

    @property
    def n_bytes(self) -> int:
        """Largest size of the stream."""
        return self.limits.max_bytes

    def config(self, max_message_bytes: int) -> dict[str, Any]:
        """Return the stream as the server's JSON; ``max_message_bytes`` is that server's ``max_payload``."""
        config: dict[str, Any] = {
            "name": self.name,
            "retention": "limits",
            "storage": "file",
            "num_replicas": 1,
            "discard": self.discard,
            "max_bytes": self.limits.max_bytes,
            "max_msgs": self.limits.max_messages,
            "max_msgs_per_subject": self.limits.max_messages_per_subject,
            "max_age": self.limits.max_age_s * NANOSECONDS,
            # A copy never asks again for a message it refused for its size, even after the server's limit is raised.
            "max_msg_size": -1 if self.sources else max_message_bytes,
            "subjects": list(self.subjects),
            "duplicate_window": self.limits.duplicate_window_s * NANOSECONDS,
            "allow_direct": True,
        }
        if self.sources:
            config["sources"] = [origin.config() for origin in self.sources]
        if self.announce is not None:
            config["republish"] = {"src": self.announce[0], "dest": self.announce[1], "headers_only": True}
        return config


@dataclass(frozen=True)
class BucketSpec:
    """One KV bucket: the newest value of each key; with ``ttl_s``, a key that is not renewed expires."""

    name: str
    ttl_s: float | None = None
    n_bytes: int = 64 * 2**20
    """Largest size of the bucket."""
    max_value_bytes: int | None = None
    """Largest size of one value; None means the server's ``max_payload``."""

    def config(self, max_message_bytes: int) -> dict[str, Any]:
        """Return the bucket's stream as the server's JSON; see `StreamSpec.config`."""
        config: dict[str, Any] = {
            "name": f"KV_{self.name}",
            "subjects": [f"$KV.{self.name}.>"],
            "retention": "limits",
            "storage": "file",
            "num_replicas": 1,
            "discard": "new",
            "max_msgs_per_subject": 1,
            "max_bytes": self.n_bytes,
            "max_msg_size": min(max_message_bytes, self.max_value_bytes or max_message_bytes),
            "allow_direct": True,
            "allow_rollup_hdrs": False,  # else a service that renews one key could delete all others
            "deny_delete": True,
        }
        if self.ttl_s is not None:
            config["max_age"] = config["duplicate_window"] = int(self.ttl_s * NANOSECONDS)
        return config


def at_hub(run: str, regions: Sequence[str], *, leaves: bool = True) -> tuple[StreamSpec, ...]:
    """Return the streams that the coordinator ensures.

    They are models and control messages, an inbox for each of the ``regions`` directly below, a copy of the models for
    each, compositions, and rejects.
    """
    models = StreamSpec(
        name=subjects.models_stream(run, HUB),
        subjects=(f"{subjects.model(run)}.>", subjects.control(run)),
        limits=MODELS,
        discard="old",
        pulse=subjects.pulse(run, HUB),
    )
    inboxes, down = (inbox(run, HUB, region, leaves=leaves) for region in regions), _handed_down(run, HUB, regions)
    return (models, *inboxes, *down, _compositions(run, HUB), _rejects(run, HUB))


def at_uplink(
    run: str, region: str, parent: str | None = None, children: Sequence[str] = (), *, leaves: bool = True
) -> tuple[StreamSpec, ...]:
    """Return the streams that an aggregator ensures in its uplink account.

    They are its aggregates and, if it has a leaf, models, an inbox for each child, and a copy of the models for each.
    """
    aggregates = StreamSpec(
        name=subjects.aggregates_stream(run, region),
        subjects=(f"{subjects.aggregate(run, region)}.>",),
        limits=AGGREGATES,
        discard="new",
        pulse=subjects.pulse(run, region),
    )
    if not leaves:
        return (aggregates,)
    above = parent or HUB
    models = StreamSpec(
        name=subjects.models_stream(run, region),
        sources=(
            Origin(
                subjects.models_for_stream(run, region),
                api=permissions.api_of(above),
                deliver=permissions.deliver(region),
                pulse=subjects.pulse(run, above),
                says_limit=True,
            ),
        ),
        limits=MODELS,
        discard="old",
    )
    inboxes, down = (inbox(run, region, child) for child in children), _handed_down(run, region, children)
    return (models, aggregates, *inboxes, *down)


def in_region(run: str, region: str, sites: Iterable[str], *, leaves: bool = True) -> tuple[StreamSpec, ...]:
    """Return the streams that an aggregator ensures in its private account.

    They are models for the sites, the updates of each site, receipts, compositions, and rejects.
    """
    origin = Origin(
        subjects.models_stream(run, region) if leaves else subjects.models_for_stream(run, region),
        api=permissions.UPLINK_API,
        deliver=permissions.deliver(region),
    )
    models = StreamSpec(
        name=subjects.models_stream(run, region),
        sources=(origin,),
        limits=MODELS,
        discard="old",
        announce=(f"fed.{run}.>", f"fed.{run}.>"),
    )
    receipts = StreamSpec(
        name=subjects.receipts_stream(run, region),
        subjects=(subjects.receipt(run, region, "*"),),
        limits=RECEIPTS,
        discard="old",
    )
    of_sites = (updates(run, region, site) for site in sites)
    return (models, *of_sites, receipts, _compositions(run, region), _rejects(run, region))


def updates(run: str, region: str, site: str) -> StreamSpec:
    """Return the stream of one site's updates and evaluations; its limits are the site's quota."""
    return StreamSpec(
        name=subjects.updates_stream(run, region, site),
        subjects=(f"{subjects.update(run, region, site)}.>", subjects.evaluation(run, region, site)),
        limits=UPDATES,
        discard="new",
    )


def needed_bytes(specs: Iterable[StreamSpec | BucketSpec]) -> int:
    """Return how many bytes a server must be allowed to store for all of ``specs``."""
    return sum(spec.n_bytes for spec in specs)


def buckets(run: str) -> tuple[BucketSpec, ...]:
    """Return the presence and state buckets; the coordinator ensures them at the hub, an aggregator in its account."""
    return (presence(run), BucketSpec(subjects.state_bucket(run)))


def presence(run: str) -> BucketSpec:
    """Return the presence bucket; an aggregator above others also ensures it in its uplink account."""
    return BucketSpec(subjects.presence_bucket(run), ttl_s=PRESENCE_TTL_S, max_value_bytes=2**16)


def inbox(run: str, node: str, region: str, *, leaves: bool = True) -> StreamSpec:
    """Return the stream of messages from ``region`` to the ``node`` above it; its limits are the region's quota there.

    A copy takes any subject that its origin has. So messages that a region's own server files under another region's
    name stay in this inbox.
    """
    stream = subjects.aggregates_stream(run, region)
    pulse = subjects.pulse(run, region) if leaves else None
    origin = Origin(stream, permissions.below_api(region), permissions.lift(region), pulse)
    return StreamSpec(name=subjects.inbox_stream(run, node, region), sources=(origin,), limits=INBOX, discard="new")


def _handed_down(run: str, node: str, regions: Sequence[str]) -> Iterable[StreamSpec]:
    """Yield a copy of the models for each region, each in its own account, so that no region can affect another's."""
    for region in regions:
        origin = Origin(subjects.models_stream(run, node), permissions.above_api(), permissions.hand_down(region))
        yield StreamSpec(
            name=subjects.models_for_stream(run, region),
            sources=(origin,),
            limits=MODELS,
            discard="old",
            api=permissions.down_api(region),
        )


def _compositions(run: str, node: str) -> StreamSpec:
    return StreamSpec(
        name=subjects.compositions_stream(run, node),
        subjects=(subjects.composition(run, node, "*"),),
        limits=COMPOSITIONS,
        discard="old",
    )


def _rejects(run: str, node: str) -> StreamSpec:
    return StreamSpec(
        name=subjects.rejects_stream(run, node), subjects=(subjects.rejects(run, node),), limits=REJECTS, discard="old"
    )
