"""Accounts of a server, the subjects they share, and both as server configuration.

A server sends an answer to a request's reply subject, and a consumer delivers to the subject that its maker chose.
Neither is checked against anybody's permissions, but both stay within one account. So a user that must not write into
a stream has an account of its own, without streams, which *imports* the subjects that the user may ask on. Answers go
back through the import to the user's account, where nothing is stored (`Grant.service`).
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from fednats import permissions, subjects
from fednats.permissions import User
from fednats.subjects import HUB

_DENIED_FROM_ABOVE = ("STREAM", "DIRECT", "META", "SERVER", "ACCOUNT", "$KV", "$OBJ")
_CONSUMER_VERBS_DENIED = ("DURABLE", "DELETE", "INFO", "LIST", "NAMES", "MSG", "LEADER", "PAUSE", "UNPIN", "RESET")


@dataclass(frozen=True)
class BusAccount:
    """One account of a server; ``streams`` says whether it may have streams."""

    name: str
    users: tuple[User, ...]
    streams: bool = True


@dataclass(frozen=True)
class Grant:
    """A subject that account ``owner`` shares with account ``user``; ``to`` is its name there, if different.

    ``kind`` is ``service`` or ``stream``.
    """

    owner: str
    user: str
    kind: str
    subject: str
    to: str = ""
    streamed: bool = False
    """Whether a request to the service may have several answers."""

    @classmethod
    def service(cls, owner: str, user: str, subject: str, to: str = "", *, streamed: bool = False) -> Self:
        """Let ``user`` publish into ``owner``; answers come back into ``user``."""
        return cls(owner, user, "service", subject, "" if to == subject else to, streamed)

    @classmethod
    def stream(cls, owner: str, user: str, subject: str) -> Self:
        """Let ``user`` hear a subject of ``owner``."""
        return cls(owner, user, "stream", subject)


# --- shares -----------------------------------------------------------------------------------------------------------


def copying(owner: str, user: str, stream: str, api: str, deliver: str, api_there: str = "$JS.API") -> list[Grant]:
    """Let a stream in ``user`` copy ``stream`` of ``owner``: requests go to ``api``, messages arrive below ``deliver``.

    ``api_there`` is the prefix of the API in ``owner``.
    """
    asked = zip(permissions.copied(api_there, stream), permissions.copied(api, stream), strict=True)
    return [
        *(Grant.service(owner, user, there, here, streamed=True) for there, here in asked),
        Grant.service(owner, user, f"$JS.FC.{stream}.>"),
        Grant.stream(owner, user, f"{deliver}.>"),
    ]


def of_site(run: str, region: str, private: str, observer: str, site: str, account: str) -> list[Grant]:
    """Return what a site's account shares with its region's private account and with the observer's."""
    allowed, receipt = permissions.site(run, region, site), subjects.receipt(run, region, site)
    answers = permissions.answer_observer(region)
    heard = (subjects.head(subjects.model(run)), subjects.control(run), receipt)
    return [
        *(Grant.service(private, account, subject) for subject in allowed.publish if subject != answers),
        *(Grant.stream(private, account, subject) for subject in heard),
        *asked_by_observer(observer, account, region, [subjects.status(run, "site", site)]),
    ]


def of_observer(run: str, node: str, owner: str, account: str) -> list[Grant]:
    """Return what an observer's account shares with the account that it observes, both ways."""
    allowed = permissions.observer(run, node)
    asked = [subject for subject in allowed.publish if subject.startswith("$JS.API.")]
    role = "coordinator" if node == HUB else "aggregator"
    own = f"{permissions.inbox(permissions.user_name('observer', node))}.>"
    return [
        *(Grant.service(owner, account, subject) for subject in asked),
        *(Grant.stream(owner, account, subject) for subject in allowed.subscribe if subject != own),
        *asked_by_observer(account, owner, node, [subjects.status(run, role, node)]),
    ]


def asked_by_observer(above: str, account: str, node: str, statuses: Sequence[str]) -> list[Grant]:
    """Let services in ``account`` hear the questions of ``node``'s observer through account ``above``, and answer."""
    return [
        *(Grant.stream(above, account, subject) for subject in ("$SRV.>", *statuses)),
        Grant.service(above, account, permissions.answer_observer(node)),
    ]


def of_child(
    run: str, node: str, owner: str, observer: str, child: str, below: Sequence[str], *, leaves: bool
) -> list[Grant]:
    """Return what a node, with its account ``owner``, shares with the region ``child`` directly below it.

    Each child copies the models from an account of its own, because a user that may make a consumer can do anything to
    the streams of that consumer's account. ``below`` are the regions below the child, at any depth.
    """
    uplink, down, run_models = uplink_of(child), down_to(child), subjects.models_stream(run, node)
    handed, aggregates = subjects.models_for_stream(run, child), subjects.aggregates_stream(run, child)
    nodes = (child, *below)
    events = (subjects.event(run, "aggregator", each) for each in nodes)
    presences = [permissions.presence(run, "aggregator", each) for each in (nodes if node == HUB else (child,))]
    if node != HUB:
        presences += [f"{permissions.api_of(HUB)}.{permissions.presence(run, 'aggregator', each)}" for each in nodes]
    theirs = "$JS.API" if not leaves else permissions.api_of(child)
    statuses = [subjects.status(run, "aggregator", each) for each in nodes]
    taken = permissions.taken(run, child, subjects.inbox_stream(run, node, child))
    return [
        *copying(owner, down, run_models, permissions.above_api(), permissions.hand_down(child)),
        *(
            Grant.service(
                down, owner, f"$JS.API.STREAM.{verb}.{handed}", f"{permissions.down_api(child)}.STREAM.{verb}.{handed}"
            )
            for verb in permissions.MADE
        ),
        *(copying(down, uplink, handed, "$JS.API", permissions.deliver(child)) if leaves else ()),
        *copying(uplink, owner, aggregates, permissions.below_api(child), permissions.lift(child), theirs),
        *(Grant.service(owner, uplink, subject) for subject in (*presences, *events, subjects.pulse(run, child))),
        *(Grant.service(owner, uplink, f"$JS.API.{asked}") for asked in taken),
        Grant.stream(owner, uplink, subjects.pulse(run, node)),
        *asked_by_observer(observer, uplink, HUB, statuses),
    ]


def uplink_of(child: str) -> str:
    """Return the name of a region's account at the node above, where its leaf link or its uplink user connects."""
    return f"UPLINK_{child}"


def down_to(child: str) -> str:
    """Return the name of the account at the node above from which a region copies the models."""
    return f"DOWN_{child}"


# --- server configuration ---------------------------------------------------------------------------------------------


def render(accounts: Iterable[BusAccount], shares: Iterable[Grant] = (), *, region: str = "") -> str:
    """Return ``accounts.conf`` of one server; for a leaf (``region`` is set), also what it denies servers above."""
    shared = tuple(shares)
    named = {account.name: _account(account, shared) for account in accounts}
    text = f"accounts: {json.dumps(named, indent=2)}\n"
    return f"deny_imports: {json.dumps(denied_from_above(region), indent=2)}\n{text}" if region else text


def denied_from_above(region: str) -> list[str]:
    """Return the JetStream requests that a leaf refuses from above, whatever the server above allows."""
    api = permissions.api_of(region)
    whole = [f"{api}.{verb}.>" for verb in _DENIED_FROM_ABOVE]
    return [f"{api}.INFO", *whole, *(f"{api}.CONSUMER.{verb}.>" for verb in _CONSUMER_VERBS_DENIED)]


def _account(account: BusAccount, shares: Sequence[Grant]) -> Mapping[str, object]:
    shared = {"exports": _exports(account.name, shares), "imports": _imports(account.name, shares)}
    return {
        **({"jetstream": "enabled"} if account.streams else {}),
        "users": [_user(user) for user in account.users],
        **{key: value for key, value in shared.items() if value},
    }


def _exports(name: str, shares: Sequence[Grant]) -> list[Mapping[str, object]]:
    users: dict[tuple[str, str, bool], list[str]] = {}
    for share in shares:
        if share.owner == name:
            users.setdefault((share.kind, share.subject, share.streamed), []).append(share.user)
    return [
        {kind: subject, **({"response_type": "stream"} if streamed else {}), "accounts": accounts}
        for (kind, subject, streamed), accounts in users.items()
    ]


def _imports(name: str, shares: Sequence[Grant]) -> list[Mapping[str, object]]:
    return [
        {share.kind: {"account": share.owner, "subject": share.subject}, **({"to": share.to} if share.to else {})}
        for share in shares
        if share.user == name
    ]


def _user(user: User) -> Mapping[str, object]:
    allowed = user.permissions
    return {
        "nkey": user.public_key,
        "permissions": {"publish": {"allow": allowed.publish}, "subscribe": {"allow": allowed.subscribe}},
        "allowed_connection_types": ["LEAFNODE" if user.leaf else "STANDARD"],
    }
