"""A hospital and a region with real keys lie about numbers, one lie after another: both are named, and nobody stops."""

import asyncio
import json
import statistics
import tomllib
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
import torch

from fednats.learning.flat import write_vector
from fednats.messages import Aggregate
from fednats.permissions import user_name
from fednats.storage.checkpoints import checkpoints_folder, newest_checkpoint, weights_file
from fednats.storage.tensor_file import TensorFile
from fednats.subjects import HUB
from fednats.testbed.launch import COORDINATOR, Running, running
from fednats.testbed.processes import DaemonProcess
from fednats.transport.bus import Bus
from fednats.verify.books import Book
from fednats.verify.joined import settled
from tests.e2e.conftest import MakeFederation
from tests.e2e.liars import MADE_UP, LyingSite, made_up, moved, negative, send_sum
from tests.e2e.own_task import MyTask
from tests.e2e.test_bad_input import steady
from tests.e2e.test_participation import further, log_of, metric
from tests.e2e.test_runs import order_file, run
from tests.e2e.until import ENDLESS, Statuses, end_after, reached, until

HONEST = ("a", "b", "c", "d")
LEARNING = {
    "training": {"local_steps": 20, "batch_size": 16, "learning_rate": 0.05},
    "server": {"learning_rate": 0.2},
}
N_VERSIONS = 30
"""Versions after which the federation without the liar's hospital has learned all it can."""


async def test_a_hospital_and_a_region_that_lie_about_numbers_stop_nobody(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b", "liar"], "south": ["c", "d"]}, **LEARNING, stop=ENDLESS)
    async with running(federation, tmp_path / "out") as now:
        await now.daemons["site-liar"].kill()  # the test sends in its name, with its key
        await until(now, lambda statuses: statuses.get("aggregator-north", {}).get("version", -1) >= 0)
        servers, public_key = now.servers, (now.output / "kits" / "region-north" / "epoch-1.public").read_bytes()
        async with (
            Bus.connect(servers.site("north", "liar"), user_name("site", "liar")) as site_bus,
            Bus.connect(servers.uplink("south"), user_name("uplink", "south")) as south_bus,
            Bus.connect(servers.observer("north"), user_name("observer", "north")) as north_listens,
            Bus.connect(servers.observer(HUB), user_name("observer", HUB)) as hub_listens,
        ):
            notices: list[Mapping[str, Any]] = []
            await north_listens.answer("fed.small.event.aggregator.north", taken_into(notices))
            await hub_listens.answer("fed.small.event.coordinator.hub", taken_into(notices))
            identity = servers.identity("site", "liar")
            liar = LyingSite(site_bus, identity, "north", "liar", tmp_path / "liar.csv", public_key)

            async def claim(mass: float) -> None:
                region = servers.identity("aggregator", "south")
                await send_sum(south_bus, region, "south", await steady(site_bus), public_key, mass)

            async with asyncio.TaskGroup() as group:
                lying = group.create_task(liar.run())
                await lies_about_cases(now, liar, notices)
                before = scales(now)
                await lies_about_mass(now, claim, notices)
                await lies_about_test_cases(now, liar)
                after = scales(now)[len(before) + 10 :]
                # A bounded claim may cost two thirds, and so may a smaller sum; a claim of 20 times that is believed costs 95 %.
                assert statistics.median(after) > statistics.median(before) / 10, "the model's steps keep their length"
                statuses = await end_after(now, 1)
                lying.cancel()
        findings = (await settled(now.output)).findings
        with_liars = accuracy(now)
        without = await accuracy_without(now, tmp_path)
    in_its_name = [finding for finding in findings if "which south did not make" in finding]
    assert len(in_its_name) == 2, "`fednats verify` names the sums that are in no journal of the region"
    assert all("of liar" in finding for finding in findings if finding not in in_its_name)
    assert statuses[COORDINATOR]["refusals"] == statuses["aggregator-south"]["refusals"] == {}
    assert without > 0.93
    assert with_liars > without - 0.02


async def lies_about_cases(now: Running, liar: LyingSite, notices: list[Mapping[str, Any]]) -> None:
    """A hospital claims far too many training cases from the first version on: it counts for three, and is named."""
    untrained = accuracy(now)
    for n_times, claim in (("ever so many", 10**12), ("20 times", 20 * liar.n_train)):
        liar.lie.claim = claim
        statuses = await until(now, bounds("aggregator-north", "liar", claim))
        said = statuses["aggregator-north"]["claims_bounded"]["liar"]
        assert liar.n_train <= said["believed"] <= 3.1 * liar.n_train, n_times
        assert await metric(now.daemons["aggregator-north"], "fednats_claims_bounded") == 1
        await further(now, 8)
    (logged, *_) = log_of(now.daemons["aggregator-north"], "claim_bounded")
    assert (logged["source"], logged["claimed"]) == ("liar", 10**12)
    assert said_of(notices, "aggregator")[0].items() >= {"source": "liar", "claimed": 1e12}.items()
    assert accuracy(now) > max(untrained, 0.9), "the others learn on"
    register(now.daemons["aggregator-north"], liar=liar.n_train)
    await until(
        now, lambda statuses: statuses["aggregator-north"]["claims_bounded"]["liar"]["believed"] == liar.n_train
    )
    liar.lie.claim = liar.n_train
    await until(now, lambda statuses: statuses["aggregator-north"]["claims_bounded"] == {})
    assert await metric(now.daemons["aggregator-north"], "fednats_claims_bounded") == 0


async def lies_about_mass(
    now: Running, claim: Callable[[float], Awaitable[None]], notices: list[Mapping[str, Any]]
) -> None:
    """A region claims far too much mass for its sum: it counts for a bounded part, and is named."""
    usual = statistics.median(
        taken.head.mass
        for taken in Book(HUB, now.output / COORDINATOR / "journal.sqlite").taken.values()
        if isinstance(taken.head, Aggregate) and taken.head.region == "south"
    )
    for mass in (1e15, 20 * usual):
        await claim(mass)
        await until(now, partial(is_said, notices, mass))
        (said,) = (said for said in said_of(notices, "coordinator") if said["claimed"] == mass)
        assert said["source"] == "south"
        assert said["believed"] <= 10 * usual
        statuses = await further(now, 4)
        assert statuses[COORDINATOR]["claims_bounded"].keys() <= {"south"}
    assert {line["claimed"] for line in log_of(now.daemons[COORDINATOR], "claim_bounded")} >= {1e15, 20 * usual}


async def lies_about_test_cases(now: Running, liar: LyingSite) -> None:
    """A hospital makes up its evaluations: they are left out, alone or with its region's, and choose no version."""
    await until(now, evaluated_by_all)
    liar.lie.registered = MADE_UP
    statuses = await until(now, lambda statuses: "test_cases" in statuses["aggregator-north"]["refusals"])
    assert statuses["aggregator-north"]["refusals"].keys() == {"test_cases"}
    refused = log_of(now.daemons["aggregator-north"], "refused")[-1]
    assert f"liar evaluates on {MADE_UP} test cases and began the run with {liar.n_test}" in refused["detail"]
    liar.lie.registered = liar.n_test
    for counts, why in (
        (made_up, "test cases from north, whose hospitals registered"),
        (negative, "contradict each other"),
        (moved, "contradict each other"),
    ):
        liar.lie.counts = counts
        await until(now, partial(has_left_out, now, why, n_left_out(now, why) + 3))
    liar.lie.counts = type(liar.lie).counts
    n_before = (await until(now, reached(0)))[COORDINATOR]["version"]
    statuses = await until(
        now, lambda statuses: evaluated_by_all(statuses) and statuses[COORDINATOR]["history"][-1]["version"] > n_before
    )
    history = statuses[COORDINATOR]["history"]
    most = max(entry["n_samples"] for entry in history if entry["n_sites"] == len(HONEST) + 1)
    assert all(entry["n_samples"] <= most < MADE_UP for entry in history)
    best = statuses[COORDINATOR]["best"]["version"]
    assert [entry["n_sites"] for entry in history if entry["version"] == best] in ([], [len(HONEST) + 1])


async def accuracy_without(now: Running, folder: Path) -> float:
    """Return the accuracy of a second run of the same federation, without the liar's hospital."""
    first = (await until(now, reached(0)))[COORDINATOR]["version"] + 1
    order = order_file(folder, **LEARNING, name="without", seed=0, stop=ENDLESS)
    assert f"its first version is {first}" in await run(now.output, "start", order)
    await until(now, reached(first + N_VERSIONS))
    return accuracy(now)


def register(aggregator: DaemonProcess, **n_samples: int) -> None:
    """Change the settings file of a running aggregator, as its operator does with a new kit."""
    file = aggregator.state_dir / "aggregator.toml"
    settings = tomllib.loads(file.read_text(encoding="utf-8"))
    new = file.with_suffix(".new")
    new.write_text(tomli_w.dumps({**settings, "n_samples": n_samples}), encoding="utf-8")
    new.replace(file)


def taken_into(notices: list[Mapping[str, Any]]) -> Callable[[bytes], Awaitable[bytes | None]]:
    async def take(data: bytes) -> None:
        notices.append(json.loads(data))

    return take


def said_of(notices: list[Mapping[str, Any]], role: str) -> list[Mapping[str, Any]]:
    """Return the notices of a role about claims that it believes only in part."""
    return [each["details"] for each in notices if (each["role"], each["what"]) == (role, "claim_bounded")]


def bounds(daemon: str, source: str, claimed: float) -> Callable[[Statuses], bool]:
    return lambda statuses: statuses[daemon]["claims_bounded"].get(source, {}).get("claimed") == claimed


def is_said(notices: list[Mapping[str, Any]], claimed: float, _statuses: Statuses) -> bool:
    return any(said["claimed"] == claimed for said in said_of(notices, "coordinator"))


def has_left_out(now: Running, why: str, count: int, _statuses: Statuses) -> bool:
    return n_left_out(now, why) >= count


def evaluated_by_all(statuses: Statuses) -> bool:
    history = statuses[COORDINATOR]["history"]
    return bool(history) and history[-1]["n_sites"] == len(HONEST) + 1


def n_left_out(now: Running, why: str) -> int:
    """Count the evaluations of north that the coordinator left out for the reason ``why``."""
    return sum(why in line["detail"] for line in log_of(now.daemons[COORDINATOR], "evaluation_left_out"))


def scales(now: Running) -> list[float]:
    """Return the length of each step of the model."""
    book = Book(HUB, now.output / COORDINATOR / "journal.sqlite")
    return [made.combination.scale for made in book.made.values() if made.combination is not None]


def accuracy(now: Running) -> float:
    """Return the newest version's accuracy on all patients of the honest hospitals."""
    folder = checkpoints_folder(now.output / COORDINATOR)
    newest = newest_checkpoint(folder)
    assert newest is not None
    with TensorFile.read(weights_file(folder, newest.version)) as file:
        weights = np.array(file[0 : len(file)])
    tasks = [MyTask(str(now.output.parent / f"{site}.csv")) for site in HONEST]
    model = tasks[0].model()
    write_vector(model, weights)
    with torch.inference_mode():
        right = [
            (model(inputs).argmax(1) == labels).float()
            for task in tasks
            for inputs, labels in (task.patients(test=test).tensors for test in (False, True))
        ]
    return float(torch.cat(right).mean())
