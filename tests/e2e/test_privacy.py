"""Differential privacy in whole federations: the budget is kept, sites without budget stop, nobody waits for them."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import aiohttp
import numpy as np
import pytest

from fednats.errors import TaskError
from fednats.privacy import rdp
from fednats.privacy.account import Place, PrivacyAccount
from fednats.privacy.policy import Budget, Policy
from fednats.testbed.launch import run_federation, running
from fednats.testbed.summary import spent
from fednats.verify.joined import APPLIED
from fednats.web.server import PORT_FILE
from tests.e2e.conftest import MakeFederation
from tests.e2e.faults import found, outbox
from tests.e2e.ledgers import balanced
from tests.e2e.until import ENDLESS, Statuses, end_after, until

TRAINING = {
    "local_steps": 5,
    "batch_size": 64,
    "learning_rate": 0.3,
    "momentum": 0.0,
    "dp": {"noise_multiplier": 4.0, "max_grad_norm": 1.0},
}
ALLOWED = 3
"""Passes that the budget of one site allows."""


def n_cases(file: Path) -> int:
    """Return the number of training cases in a site's table: four in five."""
    rows = len(np.loadtxt(file, delimiter=","))
    return rows - -(-rows // 5)


def follows(statuses: Statuses, site: str) -> bool:
    return bool(statuses.get(site, {}).get("version", -1) >= statuses["coordinator"]["version"] - 1)


async def metrics(folder: Path) -> str:
    port = int((folder / PORT_FILE).read_text())
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as response:
        return await response.text()


async def test_a_site_whose_budget_is_spent_stays_a_consumer_and_nobody_waits_for_it(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    """The goal is three updates of three sites: if the region waited for the spent one, no version would follow."""
    federation = make_federation(
        {"north": ["a", "b", "c"]}, training=TRAINING, aggregation={"goal": 3}, stop={"max_versions": 10_000}
    )
    step = rdp.sampled_gaussian(4.0, min(1.0, 64 / n_cases(tmp_path / "a.csv")))
    budget = rdp.epsilon((5 * ALLOWED + 2) * step, 1e-5)
    limited = federation.sites["a"].model_copy(update={"policy": Policy(budget=Budget(max_epsilon=budget))})
    federation = federation.model_copy(update={"sites": {**federation.sites, "a": limited}})
    output = tmp_path / "out"

    def is_spent(statuses: Statuses) -> bool:
        return bool(statuses.get("site-a", {}).get("state") == "spent")

    def after(version: int) -> Callable[[Statuses], bool]:
        return lambda statuses: is_spent(statuses) and int(statuses["coordinator"]["version"]) >= version

    async with running(federation, output) as now:
        statuses = await until(now, after(ALLOWED + 2))
        privacy = statuses["site-a"]["privacy"]
        assert privacy["spent"]
        assert privacy["record"]["n_passes"] == ALLOWED
        assert privacy["record"]["epsilon"] == pytest.approx(rdp.epsilon(5 * ALLOWED * step, 1e-5))
        assert statuses["site-b"]["privacy"]["record"]["n_passes"] > ALLOWED
        text = await metrics(output / "site-a")
        assert float(re.findall(r"^fednats_epsilon_spent (\S+)$", text, re.MULTILINE)[0]) < budget
        assert float(re.findall(r"^fednats_epsilon_budget (\S+)$", text, re.MULTILINE)[0]) == pytest.approx(budget)

        assert (output / "privacy-a.sqlite").exists()
        await now.daemons["site-a"].kill()  # the account is on disk, not only in memory
        await now.daemons["site-a"].start()
        await until(now, lambda found: is_spent(found) and follows(found, "site-a"))
        statuses = await end_after(now, 2)
        ledger = await balanced(output)
    assert statuses["site-a"]["privacy"]["record"]["n_passes"] == ALLOWED
    assert statuses["site-a"]["privacy"]["max_epsilon"] == pytest.approx(budget)
    assert ledger.accepted[APPLIED] == statuses["coordinator"]["n_updates"]
    evaluated = [entry["n_sites"] for entry in statuses["coordinator"]["history"]]
    assert max(evaluated) == 3
    events = [
        json.loads(line) for line in (output / "site-a" / "daemon.log").read_text().splitlines() if line[0] == "{"
    ]
    said = [event for event in events if event["event"] == "budget_spent"]
    assert 1 <= len(said) <= 2  # once, and perhaps once more after the restart
    assert "max_epsilon" in said[0]["reason"]
    assert sum(event["event"] == "update_stored" for event in events) == ALLOWED


async def test_two_daemons_on_one_account_keep_one_budget_though_one_is_killed_in_training(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    """Hospitals a and b train on the same patients and share an account; its budget allows six passes in total."""
    allowed = 6
    federation = make_federation({"north": ["a", "b", "c"]}, training=TRAINING, stop=ENDLESS)
    step = rdp.sampled_gaussian(4.0, min(1.0, 64 / n_cases(tmp_path / "a.csv")))
    account = tmp_path / "hospital.sqlite"
    budget = Budget(max_epsilon=rdp.epsilon((5 * allowed + 2) * step, 1e-5))
    shared = {"policy": Policy(budget=budget, privacy_account=account), "slow_factor": 5.0}
    sites = {name: site.model_copy(update=shared) if name in "ab" else site for name, site in federation.sites.items()}
    federation = federation.model_copy(update={"sites": sites})

    def both_spent(statuses: Statuses) -> bool:
        return all(statuses.get(f"site-{name}", {}).get("state") == "spent" for name in "ab")

    async with running(federation, tmp_path / "out") as now:
        await found(
            now, lambda: (account.exists() and PrivacyAccount(account).n_unfinished(Place("small", "a", 0))) or None
        )
        await now.daemons["site-a"].kill()  # its pass is charged, but sends nothing
        await now.daemons["site-a"].start()
        statuses = await until(now, both_spent)
        n_stored = sum(int(outbox(now, name, "SELECT COUNT(*) FROM outgoing")[0][0]) for name in "ab")
    assert PrivacyAccount(account).n_charges("record") == allowed
    assert n_stored == allowed - 1
    for name in "ab":
        privacy = statuses[f"site-{name}"]["privacy"]
        assert privacy["record"]["epsilon"] == pytest.approx(rdp.epsilon(5 * allowed * step, 1e-5))
        assert privacy["record"]["epsilon"] <= budget.max_epsilon


async def test_both_kinds_of_noise_travel_encrypted_and_are_accounted(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation(
        {"north": ["a", "b"], "south": ["c", "d"]},
        training=TRAINING,
        delta={"dp": {"clip_norm": 1.0, "noise_multiplier": 0.02}},
        stop={"max_versions": 5},
    )
    summary = await run_federation(federation, tmp_path / "out")
    assert summary.cipher == "bfv"
    assert summary.federated["auc"] > 0.9
    for site in summary.site_figures.values():
        assert site.record is not None
        assert site.site is not None
        assert site.record.n_passes >= site.updates > 0
        assert site.record.epsilon is not None
        assert 0 < site.record.epsilon < 10
        assert site.site.epsilon is not None
        assert site.site.epsilon > 1000  # little noise on few sites hides no site, and the status says so
    assert spent(summary) is not None
    assert {path.name for path in (tmp_path / "out").glob("*.sqlite")} == {f"privacy-{n}.sqlite" for n in "abcd"}
    report = (tmp_path / "out" / "report.html").read_text()
    assert "epsilon of a record" in report


async def test_a_model_that_cannot_be_trained_with_noise_is_refused_before_anything_starts(
    make_federation: MakeFederation, tmp_path: Path
) -> None:
    file = tmp_path / "normed.py"
    file.write_text(
        "from torch import nn\nfrom fednats.learning.tasks.breast_cancer import BreastCancer\n\n\n"
        "class Normed(BreastCancer):\n    def model(self):\n"
        "        return nn.Sequential(nn.Linear(30, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))\n"
    )
    federation = make_federation({"north": ["a", "b"]}, task=f"{file}:Normed", training=TRAINING)
    with pytest.raises(TaskError, match=r"1 \(BatchNorm1d\): use nn.GroupNorm"):
        await run_federation(federation.model_copy(update={"options": {"number": None}}), tmp_path / "out")
    assert not (tmp_path / "out" / "kits").exists()
