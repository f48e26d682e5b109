"""Who may publish and subscribe to which subjects: one function per role.

NATS allows only what is listed here. A request to JetStream is a publish to ``$JS.API.<verb>.<stream>``, so rights on
streams are listed in the same way.

A server checks the subject that a user publishes on, but not the reply subject, and answers there with its own rights.
So no user shares an account with other people's streams. `fednats.provision.sharing` lists what the accounts export to
each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fednats import subjects
from fednats.subjects import HUB

UPLINK_API = "JS.uplink"
"""Prefix under which a region's private account reaches the JetStream that it copies the models from."""

_SERVICE = ("$SRV.>",)
METADATA = (
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.INFO.*",
    "$JS.API.CONSUMER.NAMES.*",
    "$JS.API.CONSUMER.LIST.*",
    "$JS.API.CONSUMER.INFO.*.*",
)

MADE = ("INFO", "CREATE", "UPDATE")
"""JetStream requests needed to make a stream."""


@dataclass(frozen=True)
class Permissions:
    """Subjects a user may publish and subscribe to.

    Nobody may answer on arbitrary reply subjects: those that a user may answer on are listed, too.
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


@dataclass(frozen=True)
class User:
    """One nkey user. A ``leaf`` user is for leaf links only and cannot connect as a client."""

    name: str
    public_key: str
    permissions: Permissions
    leaf: bool = False


# --- names ------------------------------------------------------------------------------------------------------------


def user_name(role: str, node: str) -> str:
    """Name of a bus user; also the name of its connection and part of its inbox."""
    return f"{role}.{node}"


def inbox(name: str) -> str:
    """Inbox prefix of a user; nobody else may listen there."""
    return f"_INBOX.{name}"


def deliver(region: str) -> str:
    """Prefix of the subjects that deliver the models to a region's uplink and private accounts."""
    return f"fed_deliver.{region}"


def hand_down(region: str) -> str:
    """Prefix of the subjects that fill the stream from which a region copies the models."""
    return f"fed_down.{region}"


def lift(region: str) -> str:
    """Prefix of the subjects that bring a region's aggregates to the node above."""
    return f"fed_lift.{region}"


def above_api() -> str:
    """Prefix under which the account that hands the models down reaches its node's JetStream."""
    return "JS.above"


def below_api(region: str) -> str:
    """Prefix under which a node reaches the JetStream of a region below it."""
    return f"JS.below.{region}"


def down_api(region: str) -> str:
    """Prefix under which a node makes the stream that hands the models down to a region."""
    return f"JS.down.{region}"


def api_of(node: str) -> str:
    """Prefix of a node's JetStream for requests over a leaf link."""
    return f"$JS.{node}.API"


# --- roles ------------------------------------------------------------------------------------------------------------


def site(run: str, region: str, name: str) -> Permissions:
    """A site: sends its updates, evaluations and presence; reads models, control, its receipts, its newest update."""
    models, receipt = subjects.models_stream(run, region), subjects.receipt(run, region, name)
    updates, here = subjects.updates_stream(run, region, name), presence(run, "site", name)
    return Permissions(
        publish=(
            f"{subjects.update(run, region, name)}.>",
            subjects.evaluation(run, region, name),
            here,
            subjects.event(run, "site", name),
            f"$JS.API.DIRECT.GET.{models}.{subjects.model(run)}.>",
            f"$JS.API.DIRECT.GET.{models}.{subjects.control(run)}",
            f"$JS.API.DIRECT.GET.{subjects.receipts_stream(run, region)}.{receipt}",
            f"$JS.API.DIRECT.GET.{updates}.{subjects.head(subjects.update(run, region, name))}",
            f"$JS.API.DIRECT.GET.KV_{subjects.presence_bucket(run)}.{here}",
            answer_observer(region),
        ),
        subscribe=(
            f"{inbox(user_name('site', name))}.>",
            *_wake(run),
            receipt,
            *_SERVICE,
            subjects.status(run, "site", name),
        ),
    )


def aggregator(run: str, region: str, sites: Sequence[str]) -> Permissions:
    """An aggregator in its region's private account: makes the streams, reads and purges updates, sends receipts.

    ``sites`` are the current sites and the revoked ones, whose last updates may still be in use.
    """
    models = subjects.models_stream(run, region)
    updates = [subjects.updates_stream(run, region, site) for site in sites]
    return Permissions(
        publish=(
            *(allowed for stream in updates for allowed in (*_make(stream), *_consume(stream))),
            *_make(models),
            *_read(models),
            *_compose(run, region),
            *_make(subjects.receipts_stream(run, region)),
            subjects.receipt(run, region, "*"),
            *_reject(run, region),
            *_buckets(run),
            presence(run, "aggregator", region),
            subjects.event(run, "aggregator", region),
            answer_observer(region),
        ),
        subscribe=(
            f"{inbox(user_name('aggregator', region))}.>",
            *_wake(run),
            *_watch(run),
            *_SERVICE,
            subjects.status(run, "aggregator", region),
        ),
    )


def uplink(run: str, region: str, below: Sequence[str] = ()) -> Permissions:
    """An aggregator in the uplink account (without leaves, the hub's): sends aggregates, reads those from below.

    If there are regions ``below``, it keeps their presence there.
    """
    aggregates, models = subjects.aggregates_stream(run, region), subjects.models_stream(run, region)
    inboxes = [subjects.inbox_stream(run, region, child) for child in below]
    bucket = subjects.presence_bucket(run)
    return Permissions(
        publish=(
            f"{subjects.aggregate(run, region)}.>",
            *_make(aggregates),
            *_read(aggregates),
            f"$JS.API.STREAM.PURGE.{aggregates}",
            *_make(models),
            *_read(models),
            *(allowed for stream in inboxes for allowed in (*_make(stream), *_consume(stream))),
            *((*_make(f"KV_{bucket}"), *_read(f"KV_{bucket}"), *_hand_down()) if below else ()),
            presence(run, "aggregator", region),
            f"$JS.*.API.{presence(run, 'aggregator', region)}",
            *(f"{api}.{asked}" for api in ("$JS.API", "$JS.*.API") for asked in taken(run, region, "*")),
            subjects.event(run, "aggregator", region),
            subjects.holder(run, "aggregator", region),
            f"{inbox(user_name('uplink', region))}.>",
            subjects.pulse(run, region),
            answer_observer(HUB),
        ),
        subscribe=(
            f"{inbox(user_name('uplink', region))}.>",
            subjects.holder(run, "aggregator", region),
            subjects.pulse(run, "*"),
            *((f"$KV.{bucket}.>",) if below else ()),
            *_SERVICE,
            subjects.status(run, "aggregator", region),
        ),
    )


def coordinator(run: str, regions: Sequence[str]) -> Permissions:
    """The coordinator, in the hub's account: sends models and control, reads regions' aggregates, keeps rejects."""
    models, inboxes = subjects.models_stream(run, HUB), [subjects.inbox_stream(run, HUB, region) for region in regions]
    return Permissions(
        publish=(
            f"{subjects.model(run)}.>",
            subjects.control(run),
            *_make(models),
            *_read(models),
            f"$JS.API.STREAM.PURGE.{models}",
            subjects.run_order(run),
            *(allowed for stream in inboxes for allowed in (*_make(stream), *_consume(stream))),
            *_compose(run, HUB),
            *_reject(run, HUB),
            *_buckets(run),
            presence(run, "coordinator", HUB),
            subjects.event(run, "coordinator", HUB),
            subjects.holder(run, "coordinator", HUB),
            f"{inbox(user_name('coordinator', HUB))}.>",
            subjects.pulse(run, HUB),
            *_hand_down(),
            answer_observer(HUB),
        ),
        subscribe=(
            f"{inbox(user_name('coordinator', HUB))}.>",
            subjects.run_order(run),
            subjects.holder(run, "coordinator", HUB),
            subjects.pulse(run, "*"),
            *_wake(run),
            *_watch(run),
            *_SERVICE,
            subjects.status(run, "coordinator", HUB),
        ),
    )


def observer(run: str, node: str) -> Permissions:
    """An operator's read-only user: stream and consumer figures, services, presence, state, refused messages."""
    rejects = subjects.rejects_stream(run, node)
    return Permissions(
        publish=(
            *METADATA,
            *_SERVICE,
            subjects.status(run, "*", "*"),
            *_read(f"KV_{subjects.presence_bucket(run)}"),
            *_read(f"KV_{subjects.state_bucket(run)}"),
            *_read(rejects),
            f"$JS.API.STREAM.MSG.GET.{rejects}",
        ),
        subscribe=(f"{inbox(user_name('observer', node))}.>", *_watch(run)),
    )


def link(run: str, region: str, parent: str, below: Sequence[str] = ()) -> Permissions:
    """The leaf link of ``region`` to ``parent``. Publish: traffic up from the region. Subscribe: traffic down to it.

    ``below`` are the regions, at any depth, whose presence and replies also pass this link. JetStream copies by itself:
    it creates a consumer (``CONSUMER.CREATE``, answered on ``$JSC.R``, or on ``_R_`` into another account), receives
    the messages below `deliver` or `lift`, and controls their flow on ``$JS.FC``.
    """
    aggregates, models = subjects.aggregates_stream(run, region), subjects.models_for_stream(run, region)
    nodes = (region, *below)
    return Permissions(
        publish=(
            *copied(api_of(parent), models),
            f"$JS.FC.{models}.>",
            "_R_.>",
            f"{lift(region)}.S.*",
            answer_observer(HUB),
            *(f"{api_of(parent)}.{asked}" for asked in taken(run, region, subjects.inbox_stream(run, parent, region))),
            f"{api_of(parent)}.{presence(run, 'aggregator', region)}",
            *(
                f"{api_of(HUB)}.{presence(run, 'aggregator', node)}"
                for node in nodes
                if (parent, node) != (HUB, region)
            ),
            *(subjects.event(run, "aggregator", node) for node in nodes),
            subjects.pulse(run, region),
        ),
        subscribe=(
            *copied(api_of(region), aggregates),
            f"$JS.FC.{aggregates}.>",
            "$JSC.R.*",
            "_R_.>",
            f"{deliver(region)}.S.*",
            *(f"{inbox(user_name('uplink', node))}.>" for node in nodes),
            *_SERVICE,
            *(subjects.status(run, "aggregator", node) for node in nodes),
            subjects.pulse(run, parent),
        ),
    )


def presence(run: str, role: str, node: str) -> str:
    """Subject on which a service renews its presence."""
    return f"$KV.{subjects.presence_bucket(run)}.{subjects.presence_key(role, node)}"


def taken(run: str, region: str, inbox_above: str) -> tuple[str, ...]:
    """Requests that show whether a region's newest sums have arrived above: for the heads that it wrote."""
    heads = (subjects.head(subjects.aggregate(run, region)), subjects.evaluation_sum(run, region))
    return tuple(f"DIRECT.GET.{inbox_above}.{head}" for head in heads)


def answer_observer(node: str) -> str:
    """Inbox in which the observer of ``node`` receives answers."""
    return f"{inbox(user_name('observer', node))}.>"


def _wake(run: str) -> tuple[str, ...]:
    return (subjects.head(subjects.model(run)), subjects.control(run))


def _watch(run: str) -> tuple[str, ...]:
    buckets = (subjects.presence_bucket(run), subjects.state_bucket(run))
    return (*(f"$KV.{bucket}.>" for bucket in buckets), subjects.event(run, "*", "*"))


def _buckets(run: str) -> tuple[str, ...]:
    streams = [f"KV_{bucket}" for bucket in (subjects.presence_bucket(run), subjects.state_bucket(run))]
    made = (verb for stream in streams for verb in (*_make(stream), *_read(stream)))
    return (*made, f"$KV.{subjects.state_bucket(run)}.>")


def _hand_down() -> tuple[str, ...]:
    """Requests that make the streams handing the models down; the accounts limit which streams those are."""
    return tuple(f"{down_api('*')}.STREAM.{verb}.*" for verb in MADE)


def _reject(run: str, node: str) -> tuple[str, ...]:
    return (*_make(subjects.rejects_stream(run, node)), subjects.rejects(run, node))


def _compose(run: str, node: str) -> tuple[str, ...]:
    stream = subjects.compositions_stream(run, node)
    return (*_make(stream), *_read(stream), subjects.composition(run, node, "*"))


def _make(stream: str) -> tuple[str, ...]:
    return tuple(f"$JS.API.STREAM.{verb}.{stream}" for verb in MADE)


def _read(stream: str) -> tuple[str, ...]:
    return (f"$JS.API.DIRECT.GET.{stream}.>",)


def _consume(stream: str) -> tuple[str, ...]:
    return (
        *_read(stream),
        f"$JS.API.STREAM.PURGE.{stream}",
        f"$JS.API.CONSUMER.CREATE.{stream}.>",
        f"$JS.API.CONSUMER.MSG.NEXT.{stream}.*",
        f"$JS.ACK.{stream}.>",
    )


def copied(api: str, stream: str) -> tuple[str, ...]:
    """Requests by another domain or account to the one whose stream it copies."""
    return (f"{api}.CONSUMER.CREATE.{stream}", f"{api}.CONSUMER.CREATE.{stream}.>")


# --- as a table -------------------------------------------------------------------------------------------------------


def table() -> str:
    """Return the permissions of every role as a Markdown table, for ``bus/README.md``."""
    run, region, name, parent = "RUN", "REGION", "SITE", "PARENT"
    rows = {
        f"`{user_name('site', name)}`": ("region, private", site(run, region, name)),
        f"`{user_name('aggregator', region)}`": ("region, private", aggregator(run, region, [name])),
        f"`{user_name('uplink', region)}`": ("region, uplink", uplink(run, region, ["BELOW"])),
        f"`{user_name('link', region)}`": ("parent's, leaf link only", link(run, region, parent)),
        f"`{user_name('coordinator', HUB)}`": ("hub", coordinator(run, [region])),
        f"`{user_name('observer', 'NODE')}`": ("hub; region, private", observer(run, "NODE")),
    }
    lines = ["| user | account | may publish | may subscribe to |", "|---|---|---|---|"]
    for user, (account, allowed) in rows.items():
        listed = ("<br>".join(f"`{subject}`" for subject in side) for side in (allowed.publish, allowed.subscribe))
        lines.append(f"| {user} | {account} | {' | '.join(listed)} |")
    return "\n".join(lines) + "\n"
