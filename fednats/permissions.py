"""Who may publish and subscribe to what: one function per role, and the accounts of a server as its config text.

NATS allows nothing that is not listed here. A request to JetStream is a publish to a subject ``$JS.API.<verb>.<stream>``,
so what a user may do to a stream is listed the same way.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fednats import subjects
from fednats.subjects import HUB

HUB_ACCOUNT = "HUB"
UPLINK_ACCOUNT = "UPLINK"
REGION_ACCOUNT = "REGION"

UPLINK_API = "JS.uplink"
"""Prefix under which a private account sees what it may ask of the JetStream of its uplink account."""

_SERVICE = ("$SRV.>",)
_METADATA = (
    "$JS.API.INFO",
    "$JS.API.STREAM.NAMES",
    "$JS.API.STREAM.LIST",
    "$JS.API.STREAM.INFO.*",
    "$JS.API.CONSUMER.NAMES.*",
    "$JS.API.CONSUMER.LIST.*",
    "$JS.API.CONSUMER.INFO.*.*",
)
_DENIED_FROM_ABOVE = ("STREAM", "DIRECT", "META", "SERVER", "ACCOUNT", "$KV", "$OBJ")
_CONSUMER_VERBS_DENIED = ("DURABLE", "DELETE", "INFO", "LIST", "NAMES", "MSG", "LEADER", "PAUSE", "UNPIN", "RESET")


@dataclass(frozen=True)
class Permissions:
    """Subjects a user may publish and subscribe to; ``replies``: may answer a request it received."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    replies: bool = True


@dataclass(frozen=True)
class User:
    """One nkey user; a ``leaf`` user is for leaf links only and cannot connect as a client."""

    name: str
    public_key: str
    permissions: Permissions
    leaf: bool = False


@dataclass(frozen=True)
class Account:
    """One account of a server: its users and what it shares with another account of the same server."""

    name: str
    users: tuple[User, ...]
    exports: tuple[Mapping[str, object], ...] = ()
    imports: tuple[Mapping[str, object], ...] = ()


# --- names ------------------------------------------------------------------------------------------------------------


def user_name(role: str, node: str) -> str:
    """Name of a bus user, which is also the name of its connection and part of its inbox."""
    return f"{role}.{node}"


def inbox(name: str) -> str:
    """Inbox prefix of a user; nobody else may listen there."""
    return f"_INBOX.{name}"


def deliver(region: str) -> str:
    """Prefix of the subjects on which the models come to a region, into its uplink and its private account."""
    return f"fed_deliver.{region}"


# --- roles ------------------------------------------------------------------------------------------------------------


def site(run: str, region: str, name: str) -> Permissions:
    """A site: sends its own updates, evaluations and presence; reads models, control, its own receipts, and what it sent last."""
    models, receipt = subjects.models_stream(run, region), subjects.receipt(run, region, name)
    updates, presence = subjects.updates_stream(run, region, name), _presence(run, "site", name)
    return Permissions(
        publish=(
            f"{subjects.update(run, region, name)}.>",
            subjects.evaluation(run, region, name),
            presence,
            subjects.event(run, "site", name),
            f"$JS.API.DIRECT.GET.{models}.{subjects.model(run)}.>",
            f"$JS.API.DIRECT.GET.{models}.{subjects.control(run)}",
            f"$JS.API.DIRECT.GET.{subjects.receipts_stream(run, region)}.{receipt}",
            f"$JS.API.DIRECT.GET.{updates}.{subjects.head(subjects.update(run, region, name))}",
            f"$JS.API.DIRECT.GET.KV_{subjects.presence_bucket(run)}.{presence}",
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

    ``sites`` are the present sites and the revoked ones, whose last updates may still be in use.
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
            _presence(run, "aggregator", region),
            subjects.event(run, "aggregator", region),
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
    """An aggregator in the uplink account (without leaves the hub's): sends aggregates, reads those from below.

    One that has regions ``below`` it, as `aggregator` has sites, keeps their presence there.
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
            *((*_make(f"KV_{bucket}"), *_read(f"KV_{bucket}")) if below else ()),
            _presence(run, "aggregator", region),
            f"$JS.*.API.{_presence(run, 'aggregator', region)}",
            *(f"{api}.{taken}" for api in ("$JS.API", "$JS.*.API") for taken in _taken(run, region, "*")),
            subjects.event(run, "aggregator", region),
            subjects.holder(run, "aggregator", region),
            subjects.pulse(run, region),
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
    """The coordinator, in the hub's account: sends models and control, reads aggregates of ``regions``, keeps rejects."""
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
            _presence(run, "coordinator", HUB),
            subjects.event(run, "coordinator", HUB),
            subjects.holder(run, "coordinator", HUB),
            subjects.pulse(run, HUB),
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
    """An operator's read-only user: figures of streams and consumers, services, presence, state; of messages, rejects."""
    rejects = subjects.rejects_stream(run, node)
    return Permissions(
        publish=(
            *_METADATA,
            *_SERVICE,
            subjects.status(run, "*", "*"),
            *_read(f"KV_{subjects.presence_bucket(run)}"),
            *_read(f"KV_{subjects.state_bucket(run)}"),
            *_read(rejects),
            f"$JS.API.STREAM.MSG.GET.{rejects}",
        ),
        subscribe=(f"{inbox(user_name('observer', node))}.>", *_watch(run)),
        replies=False,
    )


def link(run: str, region: str, parent: str, below: Sequence[str] = ()) -> Permissions:
    """The leaf link of ``region`` to ``parent``. Publish is what comes up from the region, subscribe what goes down.

    ``below`` are the regions, at any depth, whose presence and replies come through this link too.
    JetStream copies by itself: it asks for a consumer (``CONSUMER.CREATE``, answered on ``$JSC.R``), gets the messages on
    ``$JS.S`` or below `deliver`, and paces them on ``$JS.FC``. Down the link they come below `deliver`: a link that may
    subscribe to ``$JS.S.*`` would hear the aggregates of other regions.
    """
    aggregates, models = subjects.aggregates_stream(run, region), subjects.models_stream(run, parent)
    nodes = (region, *below)
    return Permissions(
        publish=(
            *_copied(f"$JS.{parent}.API", models),
            f"$JS.FC.{models}.>",
            "$JSC.R.*",
            "$JS.S.*",
            "_INBOX.>",
            *(f"$JS.{parent}.API.{taken}" for taken in _taken(run, region, subjects.inbox_stream(run, parent, region))),
            f"$JS.{parent}.API.{_presence(run, 'aggregator', region)}",
            *(
                f"$JS.{HUB}.API.{_presence(run, 'aggregator', node)}"
                for node in nodes
                if (parent, node) != (HUB, region)
            ),
            *(subjects.event(run, "aggregator", node) for node in nodes),
            subjects.pulse(run, region),
        ),
        subscribe=(
            *_copied(f"$JS.{region}.API", aggregates),
            f"$JS.FC.{aggregates}.>",
            "$JSC.R.*",
            f"{deliver(region)}.S.*",
            *(f"{inbox(user_name('uplink', node))}.>" for node in nodes),
            *_SERVICE,
            *(subjects.status(run, "aggregator", node) for node in nodes),
            subjects.pulse(run, parent),
        ),
        replies=False,
    )


def _presence(run: str, role: str, node: str) -> str:
    return f"$KV.{subjects.presence_bucket(run)}.{subjects.presence_key(role, node)}"


def _taken(run: str, region: str, inbox_above: str) -> tuple[str, ...]:
    """The questions whether a region's newest sums have arrived above: for the heads, which it wrote itself."""
    heads = (subjects.head(subjects.aggregate(run, region)), subjects.evaluation_sum(run, region))
    return tuple(f"DIRECT.GET.{inbox_above}.{head}" for head in heads)


def _wake(run: str) -> tuple[str, ...]:
    return (subjects.head(subjects.model(run)), subjects.control(run))


def _watch(run: str) -> tuple[str, ...]:
    buckets = (subjects.presence_bucket(run), subjects.state_bucket(run))
    return (*(f"$KV.{bucket}.>" for bucket in buckets), subjects.event(run, "*", "*"))


def _buckets(run: str) -> tuple[str, ...]:
    streams = [f"KV_{bucket}" for bucket in (subjects.presence_bucket(run), subjects.state_bucket(run))]
    made = (verb for stream in streams for verb in (*_make(stream), *_read(stream)))
    return (*made, f"$KV.{subjects.state_bucket(run)}.>")


def _reject(run: str, node: str) -> tuple[str, ...]:
    return (*_make(subjects.rejects_stream(run, node)), subjects.rejects(run, node))


def _compose(run: str, node: str) -> tuple[str, ...]:
    stream = subjects.compositions_stream(run, node)
    return (*_make(stream), *_read(stream), subjects.composition(run, node, "*"))


def _make(stream: str) -> tuple[str, ...]:
    return tuple(f"$JS.API.STREAM.{verb}.{stream}" for verb in ("INFO", "CREATE", "UPDATE"))


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


def _copied(api: str, stream: str) -> tuple[str, ...]:
    """What another domain or account asks of the one that has the stream it copies."""
    return (f"{api}.CONSUMER.CREATE.{stream}", f"{api}.CONSUMER.CREATE.{stream}.>")


# --- accounts of a server ---------------------------------------------------------------------------------------------


def hub_account(run: str, users: Iterable[User], private: Sequence[Account] = ()) -> Account:
    """The account of the hub; ``private`` are the regions' accounts when they are on this server (without leaves)."""
    exports = _exports(subjects.models_stream(run, HUB), [account.name for account in private]) if private else ()
    return Account(HUB_ACCOUNT, tuple(users), exports=exports)


def uplink_account(run: str, region: str, users: Iterable[User]) -> Account:
    """The account of a leaf that is joined to the server above; it lets the region's private account copy the models."""
    exports = _exports(subjects.models_stream(run, region), [REGION_ACCOUNT])
    return Account(UPLINK_ACCOUNT, tuple(users), exports=exports)


def private_account(run: str, region: str, users: Iterable[User], *, leaves: bool = True) -> Account:
    """A region's private account; without leaves it is one of several on the hub, named after the region."""
    if leaves:
        return Account(
            REGION_ACCOUNT,
            tuple(users),
            imports=_imports(UPLINK_ACCOUNT, subjects.models_stream(run, region), region),
        )
    imports = _imports(HUB_ACCOUNT, subjects.models_stream(run, HUB), region)
    return Account(f"{REGION_ACCOUNT}_{region}", tuple(users), imports=imports)


def _exports(models: str, accounts: Sequence[str]) -> tuple[Mapping[str, object], ...]:
    return (
        *(
            {"service": create, "response_type": "stream", "accounts": accounts}
            for create in _copied("$JS.API", models)
        ),
        {"service": f"$JS.FC.{models}.>", "accounts": accounts},
        {"stream": "fed_deliver.>", "accounts": accounts},
    )


def _imports(account: str, models: str, region: str) -> tuple[Mapping[str, object], ...]:
    creates = zip(_copied("$JS.API", models), _copied(UPLINK_API, models), strict=True)
    return (
        *({"service": {"account": account, "subject": there}, "to": here} for there, here in creates),
        {"service": {"account": account, "subject": f"$JS.FC.{models}.>"}},
        {"stream": {"account": account, "subject": f"{deliver(region)}.>"}},
    )


# --- as text ----------------------------------------------------------------------------------------------------------


def render(accounts: Iterable[Account], *, region: str = "") -> str:
    """Return ``accounts.conf`` of one server; a leaf's also says what is denied to those above its ``region``."""
    named = {account.name: _account(account) for account in accounts}
    text = f"accounts: {json.dumps(named, indent=2)}\n"
    return f"deny_imports: {json.dumps(denied_from_above(region), indent=2)}\n{text}" if region else text


def denied_from_above(region: str) -> list[str]:
    """What a leaf lets nobody above ask of its JetStream, whatever the server above allows."""
    api = f"$JS.{region}.API"
    whole = [f"{api}.{verb}.>" for verb in _DENIED_FROM_ABOVE]
    return [f"{api}.INFO", *whole, *(f"{api}.CONSUMER.{verb}.>" for verb in _CONSUMER_VERBS_DENIED)]


def _account(account: Account) -> Mapping[str, object]:
    shared = {"exports": account.exports, "imports": account.imports}
    return {
        "jetstream": "enabled",
        "users": [_user(user) for user in account.users],
        **{key: value for key, value in shared.items() if value},
    }


def _user(user: User) -> Mapping[str, object]:
    allowed = user.permissions
    permissions: dict[str, object] = {
        "publish": {"allow": allowed.publish},
        "subscribe": {"allow": allowed.subscribe},
    }
    if allowed.replies:
        permissions["allow_responses"] = True
    return {
        "nkey": user.public_key,
        "permissions": permissions,
        "allowed_connection_types": ["LEAFNODE" if user.leaf else "STANDARD"],
    }


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
