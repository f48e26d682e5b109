"""Whole federations as processes, with real servers and real encryption."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fednats import subjects
from fednats.learning.evaluation import LocalEvaluation, evaluate
from fednats.learning.task_code import make_task
from fednats.provision import servers
from fednats.provision.servers import config_file
from fednats.storage.checkpoints import checkpoints_folder, newest_checkpoint, weights_file
from fednats.storage.tensor_file import TensorFile
from fednats.testbed.comparison import evaluate_pooled
from fednats.testbed.federation import FederationSettings
from fednats.testbed.launch import run_federation, running
from fednats.transport.bus import Bus
from fednats.verify.joined import APPLIED
from tests.e2e.conftest import NORMED, MakeFederation
from tests.e2e.ledgers import assert_no_secret_is_logged, assert_sealed, audited, balanced
from tests.e2e.until import closed, closed_at, reached, until


async def test_two_regions_train_one_model(make_federation: MakeFederation, tmp_path: Path) -> None:
    stop = {"max_versions": 6, "target": 0.9}
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, task=f"{NORMED}:Normed", stop=stop)
    output = tmp_path / "out"
    summary = await run_federation(federation, output)
    assert summary.versions == 6
    assert summary.cipher == "bfv"
    assert summary.updates_accepted >= 12
    assert summary.federated["auc"] > 0.95
    assert summary.federated["accuracy"] > summary.mean_alone["accuracy"] - 0.02
    assert summary.time_to_target_s is not None
    assert summary.wan_bytes > 2 * 6 * 1000
    assert json.loads((output / "summary.json").read_text())["federated"] == summary.federated
    assert "auc" in (output / "report.html").read_text()
    model = load_file(output / "model.safetensors")
    assert {name: array.shape for name, array in model.items()} == {
        "0.weight": (16, 30),
        "0.bias": (16,),
        **{f"1.{name}": (16,) for name in ("weight", "bias", "running_mean", "running_var")},
        "1.num_batches_tracked": (),
        "3.weight": (1, 16),
        "3.bias": (1,),
    }
    assert (model["1.running_var"] > 0).all()
    assert not np.allclose(model["1.running_var"], 1.0, atol=0.05), "the statistics of the hospitals' data"
    assert all(np.isfinite(array).all() for array in model.values())
    assert_sealed(output, "small")
    assert_no_secret_is_logged(output)
    recorded = audited(output)
    assert len(recorded) == 1 + 2 + 4
    left = {record.digest for name in ("site-a", "site-b") for record in recorded[name] if record.what == "update"}
    taken = [record for record in recorded["aggregator-north"] if record.what == "accepted"]
    assert {record.digest for record in taken} <= left
    assert len(taken) >= 2
    assert {record.version for record in recorded["coordinator"] if record.what == "model"} == set(range(7))
    model_key = (output / "kits" / "coordinator" / "model-1.key").read_bytes()
    holders = [file for file in output.glob("**/*") if file.is_file() and model_key in file.read_bytes()]
    assert {file.parent.name for file in holders} == {"authority", "coordinator", *(f"site-{name}" for name in "abcd")}
    assert {file.name for file in holders} == {"model-1.key"}
    held = output / "kits" / "coordinator" / "epoch-1.secret"
    secret = held.read_bytes()
    holders = [file for file in output.glob("**/*") if file.is_file() and secret[:4096] in file.read_bytes()]
    assert holders == [held]
    assert held.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("cipher", ["bfv", pytest.param("none", marks=pytest.mark.long)])
async def test_synchronous_rounds_take_one_update_of_every_site(
    make_federation: MakeFederation, tmp_path: Path, cipher: str
) -> None:
    federation = make_federation(
        {"north": ["a", "b"], "south": ["c", "d"]},
        aggregation={"goal": "all", "region_goal": "all"},
        delta={"cipher": cipher},
        stop={"max_versions": 3},
    )
    async with running(federation, tmp_path / "out") as federation_running:
        statuses = await until(federation_running, closed)
        ledger = await balanced(tmp_path / "out")
    assert ledger.accepted[APPLIED] == 4 * 3
    assert statuses["coordinator"]["n_updates"] == 4 * 3
    assert statuses["coordinator"]["staleness_max"] == 0


async def test_aggregators_stand_under_aggregators(make_federation: MakeFederation, tmp_path: Path) -> None:
    federation = make_federation(
        {"europe": [], "north": ["a", "b"], "south": ["c", "d"]},
        regions={"europe": {}, "north": {"parent": "europe"}, "south": {"parent": "europe"}},
        aggregation={"goal": "all"},
        delta={"tiers": 2},
        stop={"max_versions": 12},
    )
    async with running(federation, tmp_path / "out") as federation_running:
        statuses = await until(federation_running, closed)
        ledger = await balanced(tmp_path / "out")
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"] == 4 * 12
    assert statuses["coordinator"]["refusals"] == {}
    history = statuses["coordinator"]["history"]
    assert history[-1]["metrics"]["auc"] > history[0]["metrics"]["auc"]
    assert history[-1]["means"] == ["margin", "not_at_a"]
    worth = {site: evaluated_at(federation, site, tmp_path / "out") for site in "abcd"}
    for name, having in (("margin", "abcd"), ("not_at_a", "bcd")):
        cases = [worth[site].n_samples for site in having]
        mean = np.average([worth[site].metrics[name] for site in having], weights=cases)
        assert history[-1]["metrics"][name] == pytest.approx(mean, rel=1e-5)


async def test_a_federation_without_leaves_is_the_same_federation(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"]}, leaves=False, stop={"max_versions": 3})
    async with running(federation, tmp_path / "out") as federation_running:
        assert not federation_running.servers.leaves
        statuses = await until(federation_running, closed)
        ledger = await balanced(tmp_path / "out")
        async with Bus.connect(federation_running.servers.observer("north"), "observer.north") as observer:
            shown = json.loads(await observer.ask(subjects.status("small", "site", "a")))
    assert statuses["site-a"]["metrics"].keys() >= {"auc", "accuracy"}
    assert shown.keys() == statuses["site-a"].keys() - {"metrics"}  # only a hospital's own port shows its metrics
    assert ledger.accepted[APPLIED] == 6
    assert statuses["coordinator"]["n_updates"] == 6
    last = statuses["coordinator"]["history"][-1]  # from encrypted counts over a fifth of 569 patients
    assert (last["version"], last["n_sites"], last["n_samples"]) == (3, 2, 114)
    assert last["means"] == ["margin"]  # only one hospital has the other metric, which is fewer than min_sites
    assert "not_at_a" not in last["metrics"]
    exact = evaluate_pooled(federation, last_weights(tmp_path / "out"))
    assert last["metrics"]["auc"] == pytest.approx(exact["auc"], abs=0.002)
    assert last["metrics"]["accuracy"] == pytest.approx(exact["accuracy"])


def evaluated_at(federation: FederationSettings, site: str, output: Path) -> LocalEvaluation:
    task = federation.task_of(site)
    return evaluate(make_task(task.path, task.options), last_weights(output))


def last_weights(output: Path) -> NDArray[np.float32]:
    folder = checkpoints_folder(output / "coordinator")
    newest = newest_checkpoint(folder)
    assert newest is not None
    with TensorFile.read(weights_file(folder, newest.version)) as weights:
        return weights[0 : len(weights)]


async def test_killed_daemons_come_back_and_nothing_counts_twice(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation({"north": ["a", "b"], "south": ["c", "d"]}, stop={"max_versions": 12})
    async with running(federation, tmp_path / "out") as federation_running:
        for at_version, name in ((2, "site-a"), (3, "aggregator-north"), (4, "coordinator")):
            before = await until(federation_running, reached(at_version))
            await federation_running.daemons[name].kill()
            await federation_running.daemons[name].start()
        statuses = await until(federation_running, closed_at("site-a", "aggregator-north", "coordinator"))
        ledger = await balanced(tmp_path / "out")
    assert statuses["coordinator"]["version"] == 12
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"] >= 24
    for figure in ("accepted", "n_updates"):
        assert statuses["coordinator"][figure] > before["coordinator"][figure] > 0
    assert (
        statuses["coordinator"]["staleness_sum"] >= before["coordinator"]["staleness_sum"]
    )  # it may be fresh from then on
    shown = before["coordinator"]["history"]
    assert statuses["coordinator"]["history"][: len(shown)] == shown != []
    verified = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-m", "fednats", "verify", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert verified.stdout.splitlines()[-1] == ledger.line
    recorded = audited(tmp_path / "out")
    for name in ("site-a", "aggregator-north", "coordinator"):
        assert [record.what for record in recorded[name]].count("started") == 2, (
            "the killed daemon goes on in its ledger"
        )


async def test_everything_is_cut_to_what_the_servers_take_in_one_message(
    make_federation: MakeFederation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Covers models, updates and sums; the coordinator reads the size limit from the hub's server."""

    def small(name: str) -> Path:
        file = tmp_path / name
        text, n_limits = re.subn("max_payload: 1MB", "max_payload: 100KB", config_file(name).read_text())
        assert n_limits == 1
        file.write_text(text)
        return file

    monkeypatch.setattr(servers, "config_file", small)
    federation = make_federation(
        {"north": ["a", "b"]}, task="breast-cancer", options={"hidden": [200, 200]}, stop={"max_versions": 3}
    )
    federation = federation.model_copy(
        update={
            "sites": {
                name: site.model_copy(update={"options": {"number": number, "n_hospitals": 2}})
                for number, (name, site) in enumerate(federation.sites.items())
            }
        }
    )
    async with running(federation, tmp_path / "out") as federation_running:
        statuses = await until(federation_running, closed)
        ledger = await balanced(tmp_path / "out")
    assert federation.delta.chunk_bytes > 100_000, "they were lowered"
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"] >= 2 * 3
