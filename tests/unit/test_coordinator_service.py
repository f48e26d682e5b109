"""The coordinator's daemon when its jobs meet: a version is made whole, and published whole, whatever else goes on."""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import nkeys
import pytest
import structlog

from fednats import subjects, wire
from fednats.config import CoordinatorSettings, RunSettings, parse
from fednats.crypto.signing import Signer
from fednats.messages import Aggregate, Frame, Grid, Payload
from fednats.protocol.events import (
    Combination,
    Combined,
    Command,
    Configured,
    EvaluationArrived,
    KeepBest,
    Part,
    SumEvaluations,
)
from fednats.services.coordinator.service import CoordinatorService
from fednats.services.daemon.answers import CurrentVersion, PooledEvaluation
from fednats.services.daemon.lifecycle import Daemon
from fednats.services.daemon.worker import WorkerDiedError
from fednats.services.tier.inbox import Head, Inbox
from fednats.storage.checkpoints import checkpoints_folder, frame_file
from fednats.storage.chunk_file import ChunkFile
from fednats.transport.message_limit import SizeLimit
from tests.makers import FIRST, aggregate, announcement, evaluation_sum, opened

TURNS = 100
"""Of the event loop: more than a task needs to come as far as it can."""


class Process:
    """What a coordinator's worker process has in its memory, and its folder of frames."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mean: list[bytes] | None = None

    def begin(self) -> None:
        self.mean = []

    def decrypt(self, _head: Aggregate, _share: float, _position: int, data: bytes) -> float:
        assert self.mean is not None, "another process has the mean"
        self.mean.append(data)
        return 1.0

    def current(self) -> CurrentVersion:
        return version(0, "", self.frames())

    def apply(self, identity: str, *_: object) -> CurrentVersion:
        assert self.mean == [b"first", b"second"]
        frame_file(self.folder, "b").unlink()
        return version(1, identity, self.frames())

    def frames(self) -> tuple[Frame, ...]:
        names = sorted(path.stem.removeprefix("frame-") for path in self.folder.glob("frame-*"))
        payloads = [Payload(payload_id=name, n_bytes=1, digests=(wire.digest(name.encode()),)) for name in names]
        return tuple(Frame(version=0, steps=(), payload=payload) for payload in payloads)


class ShortLived:
    """A worker whose process ends with the first of these jobs."""

    def __init__(self, folder: Path, *ended_by: str) -> None:
        self.process = Process(folder)
        self.left = list(ended_by)

    async def call(self, method: str, *args: object) -> Any:
        await asyncio.sleep(0)
        if method in self.left:
            self.left.remove(method)
            self.process = Process(self.process.folder)
            raise WorkerDiedError(f"the worker process ended in {method!r}")
        if method == "pool":
            return PooledEvaluation(1, {}, {}, [], {})
        return True if method == "keep_best" else getattr(self.process, method)(*args)

    async def persist(self, _log: object, method: str, *args: object) -> Any:
        while True:
            try:
                return await self.call(method, *args)
            except WorkerDiedError:
                pass


class Hub:
    """A bus that has lost the models' stream, and takes payloads once it is let."""

    def __init__(self) -> None:
        self.takes = asyncio.Event()
        self.takes.set()
        self.payloads: list[str] = []

    async def recreated(self) -> AsyncIterator[str]:
        yield subjects.models_stream("r", subjects.HUB)
        await asyncio.Event().wait()

    async def publish_payload(self, _prefix: str, payload_id: str, chunks: AsyncIterator[bytes], **_: object) -> None:
        await self.takes.wait()
        assert [chunk async for chunk in chunks] == [payload_id.encode()]
        self.payloads.append(payload_id)

    def need(self, n_bytes: int) -> SizeLimit:
        return SizeLimit(n_bytes, n_bytes)

    async def last(self, *_: object) -> None: ...

    async def publish(self, *_: object, **__: object) -> None: ...

    async def purge(self, *_: object) -> None: ...

    async def put(self, *_: object) -> None: ...


class SumsHere:
    """An inbox with two chunks of everything; ``between`` has its turn when a sum is half read."""

    def __init__(self) -> None:
        self.between = asyncio.Event()

    async def chunks(self, head: Head) -> AsyncGenerator[bytes, None]:
        yield b"first"
        if isinstance(head, Aggregate):
            self.between.set()
            for _ in range(TURNS):
                await asyncio.sleep(0)
        yield b"second"


async def at_once() -> None: ...


class Fixture:
    def __init__(self, folder: Path, *ended_by: str) -> None:
        frames = checkpoints_folder(folder)
        frames.mkdir()
        for name in "ab":
            with ChunkFile(frame_file(frames, name)) as file:
                file.append(name.encode())
        raw = {"run": "r", "state_dir": folder, "signers_file": "s", "regions": ["north"], "model_key_file": "m"}
        raw |= {"bus": {"url": "tls://h:1"}, "task": {"path": "t.py:Task"}, "settings": {"name": "r"}}
        settings = parse(raw, CoordinatorSettings, source="test")
        signer = Signer(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())
        identity = SimpleNamespace(
            name="coordinator.hub", signer=signer, n_hospitals=4, sign=lambda _, message: wire.pack(message)
        )
        self.hub, self.inbox = Hub(), SumsHere()
        self.service = CoordinatorService(
            Daemon("coordinator", "hub", "r", structlog.get_logger()),
            settings,
            cast("Any", identity),
            cast("Any", self.hub),
            cast("Any", ShortLived(frames, *ended_by)),
        )
        self.service._compositions._may_write = at_once  # nobody else is there
        inbox = cast("Inbox", self.inbox)
        self.service._tier.inboxes = dict.fromkeys(self.service._tier.inboxes, inbox)

    async def open(self) -> None:
        """Take the run up at version 0, and an evaluation of it."""
        evaluated = EvaluationArrived(evaluation=evaluation_sum("north"))
        configured = Configured(sites=(), regions=("north",))
        await self.service._tier.feed(configured, opened(), announcement(capacity=None), evaluated)

    async def combine(self) -> list[Any]:
        part = Part(aggregate("north"), mass=1.0, staleness=0)
        return list(await self.service._combine(Combination("c", 0, (part,), scale=1.0, n_sites=2)))


def version(number: int, made_by: str, frames: tuple[Frame, ...]) -> CurrentVersion:
    grids = (Grid(grid_id="g0", steps=()),)
    return CurrentVersion(
        number,
        FIRST,
        RunSettings(name="r"),
        made_by,
        (),
        bytes(16),
        b"",
        frames,
        grids,
        "k",
        (),
        500,
        1,
        0.0,
        {"north-1": 1.0},
        {},
    )


@pytest.mark.parametrize("ended_by", ["pool", "keep_best"])
async def test_a_version_is_made_although_another_job_ends_the_process_meanwhile(tmp_path: Path, ended_by: str) -> None:
    made = Fixture(tmp_path, ended_by)
    commands: dict[str, Command] = {"pool": SumEvaluations(0, (evaluation_sum("north"),)), "keep_best": KeepBest(0)}
    async with made.service._tier.journalling(), asyncio.timeout(10), asyncio.TaskGroup() as group:
        await made.open()
        combining = group.create_task(made.combine())
        await made.inbox.between.wait()
        group.create_task(made.service._execute(commands[ended_by]))
    announced, done = combining.result()
    assert announced.version == 1
    assert done == Combined(combination_id="c", norms={"north-1": 1.0}, quarantined={})


async def test_a_sum_that_is_decrypted_again_is_counted_once_as_received(tmp_path: Path) -> None:
    made = Fixture(tmp_path, "decrypt")
    async with made.service._tier.journalling(), asyncio.timeout(10):
        await made.open()
        await made.combine()
    assert made.service._status()["received_bytes"] == aggregate("north").payload.n_bytes > 0


async def test_a_version_is_published_again_whole_although_the_next_one_is_made_meanwhile(tmp_path: Path) -> None:
    made = Fixture(tmp_path)
    made.hub.takes.clear()
    async with made.service._tier.journalling(), asyncio.timeout(10), asyncio.TaskGroup() as group:
        again = made.service._publisher.publish_again(lambda: made.service._worker.call("current"))
        publishing = group.create_task(again)
        combining = group.create_task(made.combine())
        await made.inbox.between.wait()
        await asyncio.wait({combining}, timeout=0.5)  # as far as it comes
        made.hub.takes.set()
        await combining
        publishing.cancel()
    assert made.hub.payloads == ["a", "b"]
