"""Streams and buckets of a run: who makes which, with which limits.

Each function returns what one service ensures at its start with `Bus.ensure_stream` and `Bus.ensure_bucket`.
A stream of models, compositions, receipts or rejects drops its oldest when full. All others refuse: the sender keeps what was not
taken.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fednats import permissions, subjects
from fednats.subjects import HUB

GIB = 2**30
NANOSECONDS = 10**9

PRESENCE_TTL_S = 15.0
"""A service that did not renew its presence for so long is taken to be gone; renew it three times as often."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one stream."""

    max_bytes: int
    max_age_s: int
    duplicate_window_s: int = 3600
    """For so long a message id is remembered; what is sent again within it is stored once."""
    max_messages: int = -1
    """-1 is no limit."""
    max_messages_per_subject: int = -1


MODELS = Limits(max_bytes=8 * GIB, max_age_s=365 * 86400)
UPDATES = Limits(max_bytes=8 * GIB, max_age_s=7 * 86400, max_messages=2**17)
"""Of one site. An update has 2^16 chunks at most, so two of the largest fit; each message costs the server memory, however small."""

AGGREGATES = Limits(max_bytes=16 * GIB, max_age_s=7 * 86400)
INBOX = Limits(max_bytes=16 * GIB, max_age_s=7 * 86400, max_messages=2**18)
"""Of one region, at the node above."""

COMPOSITIONS = Limits(max_bytes=GIB // 2, max_age_s=365 * 86400, max_messages=200_000)
RECEIPTS = Limits(max_bytes=GIB // 16, max_age_s=365 * 86400, max_messages_per_subject=1)
REJECTS = Limits(max_bytes=GIB, max_age_s=30 * 86400, max_messages_per_subject=16)
"""A subject is of one sender and one reason: nobody's garbage drives another's out, nor what else the same sender sent."""


@dataclass(frozen=True)
class Origin:
    """The stream that another one copies; ``api`` and ``deliver`` lead to another domain or account."""

    stream: str
    api: str | None = None
    deliver: str = ""
    pulse: str | None = None
    """What is heard from there while the link stands; none: it is on the same server."""
    says_limit: bool = False
    """Whether the pulse says how large the run's messages are: that of the node above does."""

    def config(self) -> Mapping[str, Any]:
        """Return it as the server's JSON: all of it, where the server alone might start at the newest of other origins."""
        config: dict[str, Any] = {"name": self.stream, "opt_start_seq": 1}
        if self.api is not None:
            config["external"] = {"api": self.api, "deliver": self.deliver}
        return config


@dataclass(frozen=True)
class StreamSpec:
    """One stream: it takes ``subjects``, or copies its ``sources``."""

    name: str
    limits: Limits
    discard: Literal["old", "new"]
    subjects: tuple[str, ...] = ()
    sources: tuple[Origin, ...] = ()
    announce: tuple[str, str] | None = None
    """Subject filter and subject under which what is stored here is also announced (headers only) to who listens."""
    pulse: str | None = None
    """What its maker says regularly, for those who copy it over a link."""

    @property
    def n_bytes(self) -> int:
        """The most that it takes."""
        return self.limits.max_bytes

    def config(self, max_message_bytes: int) -> dict[str, Any]:
        """Return it as the server's JSON; ``max_message_bytes`` is what that server takes."""
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
            # What a copy refused for its size it would never ask for again, also after a server's limit was raised.
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
    """One KV bucket: newest value of each key; with ``ttl_s`` a key that is not renewed disappears."""

    name: str
    ttl_s: float | None = None
    n_bytes: int = 64 * 2**20
    """The most that it takes."""
    max_value_bytes: int | None = None
    """The most that one key takes; None: what the server takes."""

    def config(self, max_message_bytes: int) -> dict[str, Any]:
        """Return the stream that is the bucket, as the server's JSON; see `StreamSpec.config`."""
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
            "allow_rollup_hdrs": False,  # else who renews one key may roll all of them up into it
            "deny_delete": True,
        }
        if self.ttl_s is not None:
            config["max_age"] = config["duplicate_window"] = int(self.ttl_s * NANOSECONDS)
        return config


def at_hub(run: str, regions: Sequence[str], *, leaves: bool = True) -> tuple[StreamSpec, ...]:
    """Streams that the coordinator ensures: models with control, the inbox of ``regions`` directly below, compositions, rejects."""
    models = StreamSpec(
        name=subjects.models_stream(run, HUB),
        subjects=(f"{subjects.model(run)}.>", subjects.control(run)),
        limits=MODELS,
        discard="old",
        pulse=subjects.pulse(run, HUB),
    )
    inboxes = (inbox(run, HUB, region, leaves=leaves) for region in regions)
    return (models, *inboxes, _compositions(run, HUB), _rejects(run, HUB))


def at_uplink(
    run: str, region: str, parent: str | None = None, children: Sequence[str] = (), *, leaves: bool = True
) -> tuple[StreamSpec, ...]:
    """Streams that an aggregator ensures in its uplink account: models (with a leaf), aggregates, inbox of children."""
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
                subjects.models_stream(run, above),
                api=f"$JS.{above}.API",
                deliver=permissions.deliver(region),
                pulse=subjects.pulse(run, above),
                says_limit=True,
            ),
        ),
        limits=MODELS,
        discard="old",
    )
    return (models, aggregates, *(inbox(run, region, child) for child in children))


def in_region(run: str, region: str, sites: Iterable[str], *, leaves: bool = True) -> tuple[StreamSpec, ...]:
    """Streams that an aggregator ensures in its private account.

    Models for the sites, updates of each site, receipts, compositions, rejects.
    """
    origin = Origin(
        subjects.models_stream(run, region if leaves else HUB),
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
    """Stream of one site's updates and evaluations: its quota."""
    return StreamSpec(
        name=subjects.updates_stream(run, region, site),
        subjects=(f"{subjects.update(run, region, site)}.>", subjects.evaluation(run, region, site)),
        limits=UPDATES,
        discard="new",
    )


def needed_bytes(specs: Iterable[StreamSpec | BucketSpec]) -> int:
    """Return what a server must be allowed to store for all of them."""
    return sum(spec.n_bytes for spec in specs)


def buckets(run: str) -> tuple[BucketSpec, ...]:
    """Presence and state; the coordinator ensures them at the hub, an aggregator in its private account."""
    return (presence(run), BucketSpec(subjects.state_bucket(run)))


def presence(run: str) -> BucketSpec:
    """Presence alone; an aggregator above regions ensures it in its uplink account too."""
    return BucketSpec(subjects.presence_bucket(run), ttl_s=PRESENCE_TTL_S, max_value_bytes=2**16)


def inbox(run: str, node: str, region: str, *, leaves: bool = True) -> StreamSpec:
    """Stream of what ``region`` sends to the ``node`` above it: its quota there.

    A copy takes whatever subjects the origin has: what a region's own server puts under another's name stays among its own.
    """
    stream = subjects.aggregates_stream(run, region)
    origin = Origin(stream, f"$JS.{region}.API", pulse=subjects.pulse(run, region)) if leaves else Origin(stream)
    return StreamSpec(name=subjects.inbox_stream(run, node, region), sources=(origin,), limits=INBOX, discard="new")


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
