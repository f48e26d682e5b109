"""Run every monitoring command in the documents, with the key named there, against real servers and services.

The tests send what the `nats` CLI sends. If the CLI is on the PATH, they run it as well.
"""

import asyncio
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import nats.errors
import pytest
import pytest_asyncio
import structlog
from nats.aio.client import Client
from nats.aio.msg import Msg

from fednats import subjects
from fednats.provision.plan import RegionPlan
from fednats.services.aggregator import service as aggregator
from fednats.services.coordinator import service as coordinator
from fednats.services.daemon.lifecycle import Daemon
from fednats.subjects import HUB
from fednats.testbed import nats_server
from fednats.testbed.bus_servers import BusServers, bus_servers
from fednats.transport.bus import Bus
from tests.plain_client import plain_client
from tests.support.connected_bus import until

RUN, REGION, SITE = "run", "north", "a"
ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "bus" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = {"RUN": RUN, "REGION": REGION, "SITE": SITE}
COMMAND = re.compile(r"^ *((?:nats |nats-server --signal |curl ).*)$", re.MULTILINE)
CLI = shutil.which("nats")

pytestmark = pytest.mark.asyncio(loop_scope="module")


@dataclass
class Watched:
    """A running federation, and an observer of each node, connected as the CLI connects."""

    servers: BusServers
    coordinator: Daemon
    aggregator: Daemon
    observers: dict[str, Client] = field(default_factory=dict)
    denied: list[str] = field(default_factory=list)
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    async def ask(self, node: str, subject: str, body: object = None) -> dict[str, Any]:
        data = b"" if body is None else json.dumps(body).encode()
        answer = await self.observers[node].request(subject, data, timeout=5)
        decoded: dict[str, Any] = json.loads(answer.data)
        assert "error" not in decoded, (subject, decoded)
        return decoded


@asynccontextmanager
async def observing(watched: Watched, node: str) -> AsyncIterator[None]:
    settings = watched.servers.observer(node)

    async def note(error: Exception) -> None:
        watched.denied.append(str(error))

    async def keep(message: Msg) -> None:
        watched.events[node].append({**json.loads(message.data), "subject": message.subject})

    watched.events[node] = []
    async with plain_client(settings, inbox_prefix=f"_INBOX.observer.{node}", error_cb=note) as client:
        await client.subscribe(f"fed.{RUN}.event.*.*", cb=keep)
        await client.flush()
        watched.observers[node] = client
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def watched(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Watched]:
    folder = tmp_path_factory.mktemp("bus")
    async with AsyncExitStack() as stack:
        servers = await stack.enter_async_context(bus_servers(folder, RUN, (RegionPlan(REGION, (SITE, "b")),)))
        log = structlog.get_logger()
        made = Watched(servers, Daemon("coordinator", HUB, RUN, log), Daemon("aggregator", REGION, RUN, log))
        for node in (HUB, REGION):
            await stack.enter_async_context(observing(made, node))
        daemons = (made.coordinator, made.aggregator)
        at_hub, in_region = servers.coordinator_settings(), servers.aggregator_settings(REGION)
        for role in ("coordinator", "aggregator"):
            (folder / role).mkdir()
        at_hub = at_hub.model_copy(update={"state_dir": folder / "coordinator"})
        in_region = in_region.model_copy(update={"state_dir": folder / "aggregator"})
        living = [
            asyncio.create_task(coordinator.coordinator(made.coordinator, at_hub)),
            asyncio.create_task(aggregator.aggregator(made.aggregator, in_region)),
        ]

        async def ready() -> bool:
            for task in living:
                if task.done():
                    task.result()
            opened = made.coordinator.status().get("version") == 0
            return opened and all(daemon.is_ready and daemon.sources for daemon in daemons)

        await until(ready, 150)  # the coordinator loads torch
        site = await stack.enter_async_context(Bus.connect(servers.site(REGION, SITE), f"site.{SITE}"))
        await site.put(subjects.presence_bucket(RUN), f"site.{SITE}", b'{"release": "0"}')
        await site.publish(subjects.head(subjects.update(RUN, REGION, SITE)), b"garbage", "1")
        try:
            yield made
        finally:
            for daemon in daemons:
                daemon.stopping.set()
            await asyncio.gather(*living)


# --- requests of the CLI ----------------------------------------------------------------------------------------------

Sends = Callable[[Watched, str, tuple[str, ...]], Awaitable[None]]


async def micro_ls(watched: Watched, node: str, _: tuple[str, ...]) -> None:
    found: list[str] = []

    async def keep(message: Msg) -> None:
        found.append(json.loads(message.data)["name"])

    client = watched.observers[node]
    inbox = client.new_inbox()
    await client.subscribe(inbox, cb=keep)
    await client.publish("$SRV.PING", reply=inbox)
    await until(lambda: has(found, "fednats-coordinator", "fednats-aggregator"))


async def micro_info(watched: Watched, node: str, names: tuple[str, ...]) -> None:
    answer = await watched.ask(node, f"$SRV.INFO.{names[0]}")
    assert answer["endpoints"][0]["subject"] == f"fed.{RUN}.status.coordinator.hub"
    assert answer["metadata"] == {"run": RUN, "name": HUB}


async def micro_stats(watched: Watched, node: str, names: tuple[str, ...]) -> None:
    async def counted() -> int:
        return int((await watched.ask(node, f"$SRV.STATS.{names[0]}"))["endpoints"][0]["num_requests"])

    before = await counted()
    await watched.ask(node, f"fed.{RUN}.status.coordinator.hub")
    assert await counted() == before + 1


async def request(watched: Watched, node: str, subject: tuple[str, ...]) -> None:
    status = await watched.ask(node, subject[0])
    assert (status["role"], status["ready"], status["version"]) == ("coordinator", True, 0)
    assert set(status["regions"]) == {"present", "waiting", "absent"}
    assert [name for names in status["regions"].values() for name in names] == [REGION]
    assert status["regions"]["absent"] == []


async def stream_report(watched: Watched, node: str, _: tuple[str, ...]) -> None:
    answer = await watched.ask(node, "$JS.API.STREAM.LIST", {"offset": 0})
    assert f"fed_{RUN}_models_hub" in {stream["config"]["name"] for stream in answer["streams"]}


async def consumer_report(watched: Watched, node: str, names: tuple[str, ...]) -> None:
    await watched.ask(node, f"$JS.API.STREAM.INFO.{names[0]}")
    answer = await watched.ask(node, f"$JS.API.CONSUMER.LIST.{names[0]}", {"offset": 0})
    assert [consumer["name"] for consumer in answer["consumers"]] == [subjects.durable(HUB, names[0])]


async def stream_subjects(watched: Watched, node: str, names: tuple[str, ...]) -> None:
    expected = {
        f"KV_fed_{RUN}_presence": {HUB: "coordinator.hub", REGION: f"site.{SITE}"}[node],
        f"fed_{RUN}_rejects_{REGION}": f"reject.{REGION}.{SITE}.signature",
    }[names[0]]

    async def listed() -> bool:
        info = await watched.ask(node, f"$JS.API.STREAM.INFO.{names[0]}", {"subjects_filter": ">"})
        return any(subject.endswith(expected) for subject in info["state"].get("subjects") or {})

    await until(listed)


async def stream_get(watched: Watched, node: str, names: tuple[str, ...]) -> None:
    stream, subject = names
    await watched.ask(node, f"$JS.API.STREAM.INFO.{stream}")
    answer = await watched.ask(node, f"$JS.API.STREAM.MSG.GET.{stream}", {"last_by_subj": subject})
    assert answer["message"]["subject"] == subject


async def kv_get(watched: Watched, node: str, names: tuple[str, ...]) -> None:
    bucket, key = names
    await watched.ask(node, f"$JS.API.STREAM.INFO.KV_{bucket}")
    value = await watched.ask(node, f"$JS.API.DIRECT.GET.KV_{bucket}.$KV.{bucket}.{key}")
    assert value.get("state") == "open" if key == "run" else "release" in value


async def sub(watched: Watched, node: str, names: tuple[str, ...]) -> None:
    heard = asyncio.Event()

    async def hear(_: Msg) -> None:
        heard.set()

    await watched.observers[node].subscribe(names[0], cb=hear)
    await watched.observers[node].flush()
    watched.coordinator.hinder("test", "an event", "test_event")
    watched.coordinator.unhinder("test")
    await asyncio.wait_for(heard.wait(), 10)  # presence is renewed every 5 s


SENT: Mapping[str, Sends] = {
    r"micro ls": micro_ls,
    r"micro info (\S+)": micro_info,
    r"micro stats (\S+)": micro_stats,
    r"request (\S+) ''": request,
    r"stream report": stream_report,
    r"consumer report (\S+)": consumer_report,
    r"stream subjects (\S+)": stream_subjects,
    r"stream get (\S+) --last-for (\S+)": stream_get,
    r"kv get (\S+) (\S+)": kv_get,
    r"sub '(\S+)'": sub,
}


async def has(found: list[str], *names: str) -> bool:
    return set(names) <= set(found)


def commands() -> list[str]:
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    found = COMMAND.findall(text)
    return [
        re.sub(r"\b(RUN|REGION|SITE)\b|(?<=_)RUN(?=_)|(?<=\.)RUN(?=\.)", named, line) for line in dict.fromkeys(found)
    ]


def named(match: re.Match[str]) -> str:
    return NAMES[match.group()]


async def test_every_documented_command_of_the_cli_is_answered_with_the_observer_s_key(
    watched: Watched, tmp_path: Path
) -> None:
    contexts = []
    for command in commands():
        if command.startswith("nats context save "):
            name, key = re.findall(r"save (\S+) .*--nkey observer\.(\S+)\.nk", command)[0]
            assert f"--tlsfirst --tlsca ca.pem --nkey observer.{key}.nk --inbox-prefix _INBOX.observer.{key}" in command
            assert (watched.servers.kits.server(key) / f"observer.{key}.nk").exists()
            assert (watched.servers.kits.server(key) / "ca.pem").exists()
            contexts.append(name)
            run_cli(
                watched,
                re.sub(r"--server \S+", f"--server {watched.servers.user('observer', key).url}", command),
                key,
                tmp_path,
            )
        elif command.startswith("nats "):
            node, rest = re.findall(r"^nats --context (\S+) (.*)$", command)[0]
            assert node in contexts, f"{command}: made no such context"
            matches = [
                (sends, found.groups()) for pattern, sends in SENT.items() if (found := re.fullmatch(pattern, rest))
            ]
            assert len(matches) == 1, f"{command}: this test does not know what the CLI sends"
            await matches[0][0](watched, node, matches[0][1])
            if not rest.startswith("sub "):
                run_cli(watched, command, node, tmp_path)
    assert sorted(contexts) == sorted([HUB, REGION])
    assert watched.denied == []


def run_cli(watched: Watched, command: str, node: str, home: Path) -> None:
    """Run the real command in the kit, if the CLI is installed."""
    if CLI is not None:
        kit, environment = watched.servers.kits.server(node), {"HOME": str(home), "XDG_CONFIG_HOME": str(home)}
        subprocess.run([CLI, *shlex.split(command)[1:]], cwd=kit, env=environment, timeout=30, check=True)


async def test_every_documented_address_answers_and_signals_reach_the_server_of_the_kit(watched: Watched) -> None:
    kits = watched.servers.kits
    readmes = {node: (kits.server(node) / "README.md").read_text(encoding="utf-8") for node in (HUB, REGION)}
    text = [*commands(), *(line for readme in readmes.values() for line in COMMAND.findall(readme))]
    paths = {re.sub(r".*http://127\.0\.0\.1:\d+", "", line) for line in text if line.startswith("curl")}
    assert paths == {"/leafz", "/healthz", "/readyz"}
    async with aiohttp.ClientSession() as session:
        for path in sorted(paths - {"/readyz"}):  # the services': tests/integration/test_web.py
            for server in (watched.servers.hub, watched.servers.leaves[REGION]):
                async with session.get(server.monitor_url + path) as response:
                    assert response.status == 200
    signals = {line for line in text if line.startswith("nats-server")}
    assert signals == {"nats-server --signal reload=server.pid"}
    for server, other in ((watched.servers.hub, REGION), (watched.servers.leaves[REGION], HUB)):
        before = reloads(watched, other)
        own = reloads(watched, server.name)
        command = [nats_server.binary(), *shlex.split(next(iter(signals)))[1:]]
        done = await asyncio.to_thread(subprocess.run, command, cwd=kits.server(server.name), check=True)
        assert done.returncode == 0
        await until(lambda server=server, own=own: more(watched, server.name, own))  # type: ignore[misc]
        assert reloads(watched, other) == before


def reloads(watched: Watched, node: str) -> int:
    return watched.servers.node(node).log_file.read_text().count("Reloaded server configuration")


async def more(watched: Watched, node: str, than: int) -> bool:
    return reloads(watched, node) > than


async def test_events_are_told_where_they_may_be_heard(watched: Watched) -> None:
    async def told() -> bool:
        return {"run_opened"} <= what(watched, HUB) and {"source_joined", "refused"} <= what(watched, REGION)

    await until(told)
    watched.aggregator.hinder("test", "an obstacle of the region", "test_event")
    watched.aggregator.unhinder("test")
    await until(lambda: has(list(what(watched, HUB)), "hindered", "unhindered"))
    for node, events in watched.events.items():
        for event in events:
            assert set(event) == {"schema", "at", "role", "name", "run", "what", "details", "subject"}
            assert event["schema"] == 1
            assert event["subject"] == f"fed.{RUN}.event.{event['role']}.{event['name']}"
            assert f"`{event['what']}`" in DOCUMENTS[0].read_text(encoding="utf-8")
            assert node == REGION or SITE not in json.dumps(event["details"]).split('"')
    joined = next(event for event in watched.events[REGION] if event["what"] == "source_joined")
    assert joined["details"] == {"source": SITE}


def what(watched: Watched, node: str) -> set[str]:
    return {event["what"] for event in watched.events[node]}


async def test_who_is_missing_is_named_on_the_spot_and_not_above(watched: Watched) -> None:
    async def present() -> bool:
        return watched.aggregator.sources["site"]["present"] == [SITE]

    await until(present)
    here = watched.aggregator.describe_here()
    assert here["sources"]["site"] == {"present": [SITE], "waiting": [], "absent": ["b"]}
    text = watched.aggregator.metrics.text().decode()
    assert f'fednats_source_present{{source="{SITE}"}} 1.0' in text
    assert 'fednats_source_present{source="b"} 0.0' in text
    seen_above = await watched.ask(HUB, f"fed.{RUN}.status.aggregator.{REGION}")
    assert "sources" not in seen_above
    assert "regions" in await watched.ask(HUB, f"fed.{RUN}.status.coordinator.hub")


async def test_an_observer_makes_no_consumer_not_even_to_list_a_bucket(watched: Watched) -> None:
    """Otherwise it could deliver messages to any subject of the account, since ``deliver_subject`` is not checked."""
    bucket = subjects.presence_bucket(RUN)
    body = {"stream_name": f"KV_{bucket}", "config": {"deliver_subject": f"fed.{RUN}.control", "ack_policy": "none"}}
    with pytest.raises(nats.errors.TimeoutError):
        await watched.observers[HUB].request(
            f"$JS.API.CONSUMER.CREATE.KV_{bucket}.x.$KV.{bucket}.>", json.dumps(body).encode(), timeout=0.3
        )
    assert any("permissions violation for publish" in words.casefold() for words in watched.denied)
