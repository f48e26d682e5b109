import math
import shlex
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fednats.codec.layout import Layout
from fednats.config import AggregationSettings, DeltaSettings, SiteSettings, TrainingSettings, parse
from fednats.crypto import sealing
from fednats.errors import BudgetSpentError, ConfigError, LocalStorageError
from fednats.learning.entries import frozen_digests
from fednats.learning.flat import initial_model, initial_vector, parameters_of
from fednats.learning.task_code import make_task
from fednats.messages import Grid, ModelManifest
from fednats.privacy import rdp
from fednats.privacy.account import Charge, Place, PrivacyAccount
from fednats.privacy.guard import Guard, account_file
from fednats.privacy.policy import NO_POLICY, Budget, Policy, read_policy
from fednats.services.site.worker import SiteWorker
from fednats.storage.local_model import model_folder
from fednats.storage.outbox import Outbox, outbox_file
from fednats.storage.tensor_file import TensorFile
from tests.makers import FIRST

PASS = Charge("record", "gaussian", 4.0, 0.2, 20)
EPSILON = rdp.epsilon(PASS.cost(), 1e-5)
OPTIONS = {"number": 0, "n_hospitals": 2}


def test_what_was_spent_adds_up_over_runs_and_restarts(tmp_path: Path) -> None:
    file = tmp_path / "privacy.sqlite"
    for run in ("first", "second"):
        account = PrivacyAccount(file)
        for version in range(3):
            account.charge(run, version, [PASS], None)
        account.close()
    again = PrivacyAccount(file)
    assert again.n_charges("record") == 6
    assert again.epsilon("record", 1e-5) == pytest.approx(rdp.epsilon(6 * PASS.cost(), 1e-5))
    assert again.epsilon("site", 1e-5) == 0.0


def test_passes_of_different_kinds_are_composed(tmp_path: Path) -> None:
    account = PrivacyAccount(tmp_path / "privacy.sqlite")
    other = Charge("record", "skellam", 1.5, 100.0)
    account.charge("r", 0, [PASS], None)
    account.charge("r", 1, [other, Charge("site", "skellam", 3.0, 100.0)], None)
    expected = rdp.epsilon(PASS.cost() + other.cost(), 1e-5)
    assert account.epsilon("record", 1e-5) == pytest.approx(expected)
    assert 0 < account.epsilon("site", 1e-5) < expected


def test_a_charge_is_on_the_disk_before_it_returns(tmp_path: Path) -> None:
    """A process is killed right after charging, before whatever it charged for."""
    file = tmp_path / "privacy.sqlite"
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom fednats.privacy.account import Charge, PrivacyAccount\n"
        "PrivacyAccount(Path(sys.argv[1])).charge('r', 0, [Charge('record', 'gaussian', 4.0, 0.2, 20)], None)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(file)], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert PrivacyAccount(file).epsilon("record", 1e-5) == pytest.approx(EPSILON)


def test_a_pass_beyond_the_budget_is_refused_and_not_booked(tmp_path: Path) -> None:
    budget = Budget(max_epsilon=1.2 * EPSILON)
    account = PrivacyAccount(tmp_path / "privacy.sqlite")
    account.charge("r", 0, [PASS], budget)
    for _ in range(2):
        with pytest.raises(BudgetSpentError, match=rf"epsilon is {EPSILON:.3f} of .* at delta 1e-05.*max_epsilon"):
            account.charge("r", 1, [PASS], budget)
    assert account.n_charges("record") == 1
    account.charge("r", 1, [Charge("record", "gaussian", 40.0, 0.2, 20)], budget)  # a quieter one still fits
    assert account.epsilon("record", 1e-5) <= budget.max_epsilon


def test_two_runs_share_one_budget(tmp_path: Path) -> None:
    one, other = (PrivacyAccount(tmp_path / "privacy.sqlite") for _ in range(2))
    budget = Budget(max_epsilon=2.5 * EPSILON)
    n_made = 0

    def until_refused() -> None:
        nonlocal n_made
        for account in (one, other) * 50:
            account.charge("r", n_made, [PASS], budget)
            n_made += 1

    with pytest.raises(BudgetSpentError):
        until_refused()
    assert one.n_charges("record") == other.n_charges("record") == n_made > 2
    assert one.epsilon("record", 1e-5) <= budget.max_epsilon


def test_a_full_disk_books_nothing_and_says_so(tmp_path: Path) -> None:
    account = PrivacyAccount(tmp_path / "privacy.sqlite")
    account.charge("r", 0, [PASS], None)
    (n_pages,) = account._connection.execute("PRAGMA page_count").fetchone()
    account._connection.execute(f"PRAGMA max_page_count = {n_pages}")
    with pytest.raises(LocalStorageError, match="Without it nothing is trained"):
        account.charge("r", 1, [PASS] * 1000, None)
    assert account.n_charges("record") == 1


def test_a_file_that_is_no_account_is_named(tmp_path: Path) -> None:
    file = tmp_path / "privacy.sqlite"
    file.write_bytes(b"not a database at all" * 1000)
    with pytest.raises(ConfigError, match=r"privacy\.sqlite"):
        PrivacyAccount(file)


# --- the guard, and the worker that asks it ---------------------------------------------------------------------------


def site(tmp_path: Path, **changes: object) -> SiteSettings:
    (tmp_path / "model.key").write_bytes(sealing.generate())
    raw = {
        "run": "r",
        "site": "a",
        "region": "north",
        "state_dir": tmp_path / "run-1" / "state",
        "signers_file": tmp_path / "signers.toml",
        "model_key_file": tmp_path / "model.key",
        "bus": {"url": "tls://127.0.0.1:4222"},
        "task": {"path": "breast-cancer", "options": OPTIONS},
    }
    return parse({**raw, **changes}, SiteSettings, source="site")


def manifest(*, training: dict[str, Any] | None = None, delta: dict[str, Any] | None = None) -> ModelManifest:
    parameters = parameters_of(initial_model(make_task("breast-cancer", OPTIONS), 0))
    return ModelManifest(
        run="r",
        opening=FIRST,
        version=0,
        task="breast-cancer",
        seed=0,
        parameters=parameters,
        weights_digest=bytes(16),
        frames=(),
        grid=Grid(grid_id="g", steps=(2.0**-8,) * len(parameters)),
        grid_ids=("g",),
        key_id="none",
        training=TrainingSettings.model_validate({"local_steps": 3, **(training or {})}),
        aggregation=AggregationSettings(),
        delta=DeltaSettings.model_validate({"cipher": "none", **(delta or {})}),
    )


LAYOUT = Layout(manifest().parameters)
DP_SGD = {"dp": {"noise_multiplier": 4.0}}
SKELLAM = {"dp": {"noise_multiplier": 4.0, "clip_norm": 0.5}}


def test_the_account_lies_beside_the_state_of_a_run_unless_the_policy_says_where(tmp_path: Path) -> None:
    assert account_file(site(tmp_path), NO_POLICY) == tmp_path / "run-1" / "privacy-a.sqlite"
    policy = tmp_path / "policy.toml"
    for line, expected in (("/elsewhere/a.sqlite", Path("/elsewhere/a.sqlite")), ("a.sqlite", tmp_path / "a.sqlite")):
        policy.write_text(f'privacy_account = "{line}"')
        assert account_file(site(tmp_path), read_policy(policy)) == expected


def test_a_budget_without_an_account_that_outlives_the_kit_is_refused(tmp_path: Path) -> None:
    policy = tmp_path / "policy.toml"
    policy.write_text("[budget]\nmax_epsilon = 5.0")
    with pytest.raises(
        ConfigError, match=r"policy\.toml: \[budget\] is over all runs .*: name its file, privacy_account = "
    ):
        SiteWorker(site(tmp_path, policy_file=policy))


def test_a_run_without_noise_at_a_site_without_budget_keeps_no_account(tmp_path: Path) -> None:
    guard = Guard(site(tmp_path), NO_POLICY)
    guard.check_pass(manifest(), 0.2, LAYOUT)
    guard.charge_pass(manifest(), 0.2, 0, 1)
    guard.charge_update(manifest(), LAYOUT, 1, dp_sgd=False)
    assert guard.spending(manifest()) is None
    assert not account_file(site(tmp_path), NO_POLICY).exists()


def test_a_run_without_noise_is_not_trained_in_at_a_site_with_a_budget(tmp_path: Path) -> None:
    guard = Guard(site(tmp_path), Policy(budget=Budget(max_epsilon=100.0)))
    with pytest.raises(BudgetSpentError, match="the run adds no noise"):
        guard.check_pass(manifest(), 0.2, LAYOUT)
    with pytest.raises(BudgetSpentError, match="the run adds no noise"):
        guard.charge_update(manifest(), LAYOUT, 1, dp_sgd=False)
    guard.charge_update(manifest(), LAYOUT, 1, dp_sgd=True)  # the noise is in it already
    with pytest.raises(BudgetSpentError, match="has no bound"):
        guard.check_pass(manifest(training={"dp": {"noise_multiplier": 0.0}}), 0.2, LAYOUT)


def test_noise_on_the_whole_delta_also_hides_a_record_at_twice_the_distance(tmp_path: Path) -> None:
    guard = Guard(site(tmp_path), NO_POLICY)
    run = manifest(delta=SKELLAM)
    guard.charge_pass(run, 0.2, 0, 1)
    assert guard.spending(run).record.epsilon == 0.0  # type: ignore[union-attr]  # nothing is released yet
    guard.charge_update(run, LAYOUT, 1, dp_sgd=False)
    spent = guard.spending(run)
    assert spent is not None
    assert spent.site is not None
    variance = (2.0 * 2**8) ** 2
    assert spent.site.epsilon == pytest.approx(rdp.epsilon(rdp.skellam(4.0, variance), 1e-5))
    assert spent.record.epsilon == pytest.approx(rdp.epsilon(rdp.skellam(2.0, variance), 1e-5))
    assert spent.site.last_epsilon == pytest.approx(spent.site.epsilon)
    assert spent.describe(spent=False)["site"]["n_passes"] == 1


def test_with_both_a_record_is_charged_for_dp_sgd_alone(tmp_path: Path) -> None:
    """What comes after DP-SGD, noise included, tells no more of a record."""
    guard = Guard(site(tmp_path), NO_POLICY)
    run = manifest(training=DP_SGD, delta=SKELLAM)
    guard.charge_pass(run, 0.2, 0, 1)
    guard.charge_update(run, LAYOUT, 1, dp_sgd=True)
    spent = guard.spending(run)
    assert spent is not None
    assert spent.record.epsilon == pytest.approx(rdp.epsilon(3 * rdp.sampled_gaussian(4.0, 0.2), 1e-5))
    assert spent.site is not None
    assert spent.site.epsilon > 0


def test_no_bound_is_null_in_json(tmp_path: Path) -> None:
    guard = Guard(site(tmp_path), NO_POLICY)
    run = manifest(training={"dp": {"noise_multiplier": 0.0}})
    guard.charge_pass(run, 0.2, 0, 1)
    spent = guard.spending(run)
    assert spent is not None
    assert math.isinf(spent.record.epsilon)
    assert spent.describe(spent=False)["record"]["epsilon"] is None


def worker(settings: SiteSettings) -> SiteWorker:
    """A worker that holds version 0."""
    folder = model_folder(settings.state_dir)
    folder.mkdir(parents=True, exist_ok=True)
    task = make_task(settings.task.path, settings.task.options)
    specs = [(spec.name, spec.shape) for spec in LAYOUT.parameters]
    with TensorFile.create(folder / "version-0.safetensors", specs, {}) as file:
        file.write(0, initial_vector(task, 0))
    return SiteWorker(settings)


def test_a_pass_is_booked_before_it_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that is interrupted stays booked: its noise may have been seen."""
    settings = site(tmp_path)
    made = worker(settings)
    booked = []

    def interrupted(*_: object) -> None:
        booked.append(PrivacyAccount(account_file(settings, NO_POLICY)).n_charges("record"))
        raise KeyboardInterrupt

    monkeypatch.setattr(made._trainer, "train", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            made.train(manifest(training=DP_SGD), False)  # noqa: FBT003 - as the daemon calls it
    assert booked == [1, 2]


def test_a_worker_runs_no_task_that_the_policy_does_not_list(tmp_path: Path) -> None:
    policy, own = tmp_path / "policy.toml", tmp_path / "own.py"
    policy.write_text(f'task_sha256 = ["{"0" * 64}"]')
    own.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    for path in ("breast-cancer", f"{own}:Own"):
        with pytest.raises(
            ConfigError, match=rf"has SHA-256 [0-9a-f]{{64}}, and task_sha256 in policy\.toml allows {'0' * 64}"
        ):
            SiteWorker(site(tmp_path, policy_file=policy, task={"path": path}))
    assert not (tmp_path / "ran").exists()


def test_what_cannot_be_trained_with_noise_is_not_charged(tmp_path: Path) -> None:
    file = tmp_path / "normed.py"
    file.write_text(
        "from torch import nn\nfrom fednats.learning.tasks.breast_cancer import BreastCancer\n\n\n"
        "class Normed(BreastCancer):\n    def model(self):\n"
        "        return nn.Sequential(nn.Linear(30, 16), nn.BatchNorm1d(16), nn.Linear(16, 2))\n"
    )
    settings = site(tmp_path, task={"path": f"{file}:Normed", "options": OPTIONS})
    task = make_task(settings.task.path, OPTIONS)
    parameters = parameters_of(initial_model(task, 0))
    folder = model_folder(settings.state_dir)
    folder.mkdir(parents=True)
    with TensorFile.create(folder / "version-0.safetensors", [(s.name, s.shape) for s in parameters], {}) as values:
        values.write(0, initial_vector(task, 0))
    frozen = frozen_digests(initial_model(task, 0))
    announced = manifest(training=DP_SGD).model_copy(update={"parameters": parameters, "frozen_digests": frozen})
    with pytest.raises(Exception, match=r"1 \(BatchNorm1d\): use nn.GroupNorm"):
        SiteWorker(settings).train(announced, False)  # noqa: FBT003 - as the daemon calls it
    assert PrivacyAccount(account_file(settings, NO_POLICY)).n_charges("record") == 0


def test_a_second_run_at_the_same_hospital_goes_on_where_the_first_ended(tmp_path: Path) -> None:
    run = manifest(training={"dp": {"noise_multiplier": 1.0}})
    spent = []

    def until_refused() -> None:
        for number in range(50):
            kit = tmp_path / f"kit-{number // 2}"
            kit.mkdir(exist_ok=True)
            policy = kit / "policy.toml"
            policy.write_text(f'privacy_account = "{tmp_path}/all-runs.sqlite"\n[budget]\nmax_epsilon = 5.0')
            settings = site(tmp_path, run=f"r{number // 2}", state_dir=kit / "state", policy_file=policy)
            made = worker(settings)
            made.train(run, False)  # noqa: FBT003 - as the daemon calls it
            update = made.encode(run)
            spending = made.spending(run)
            assert spending is not None
            assert Outbox(outbox_file(settings.state_dir)).epsilon(update.update_id) == spending.record.epsilon
            spent.append(spending.record.epsilon)

    with pytest.raises(BudgetSpentError):
        until_refused()
    assert len(spent) > 2
    assert spent == sorted(set(spent))
    assert spent[-1] <= 5.0
    assert len(list(tmp_path.glob("kit-*"))) > 1
    assert not list(tmp_path.glob("kit-*/*.sqlite"))


def test_a_worker_without_its_earlier_state_numbers_its_updates_above_the_earlier_ones(tmp_path: Path) -> None:
    numbers = []
    for kit in ("old", "new"):
        made = worker(site(tmp_path, state_dir=tmp_path / kit))
        for _ in range(2):
            made.train(manifest(), False)  # noqa: FBT003 - as the daemon calls it
            numbers.append(made.encode(manifest()).sequence)
    assert numbers == sorted(set(numbers))
    assert [numbers[1] - numbers[0], numbers[3] - numbers[2]] == [1, 1]


def test_the_update_of_a_private_delta_has_noise_and_leaves_no_noise_behind(tmp_path: Path) -> None:
    settings = site(tmp_path)
    made = worker(settings)
    run = manifest(delta=SKELLAM)
    updates = []
    for _ in range(2):
        made.train(run, False)  # noqa: FBT003 - as the daemon calls it
        updates.append(made.encode(run))
    assert all(update.saturated > 100 for update in updates)  # noise 512 steps wide on a grid of 127
    assert PrivacyAccount(account_file(settings, NO_POLICY)).n_charges("site") == 2
    with sqlite3.connect(settings.state_dir / "outbox.sqlite") as connection:
        (data,) = connection.execute(
            "SELECT data FROM residual WHERE sequence = (SELECT MAX(sequence) FROM outgoing)"
        ).fetchone()
    assert np.abs(np.frombuffer(data, "<f4")).max() < 2.0**-8


def test_an_account_with_charges_deleted_is_refused_by_name(tmp_path: Path) -> None:
    file = tmp_path / "privacy.sqlite"
    account = PrivacyAccount(file)
    for version in range(3):
        account.charge("r", version, [Charge("record", "gaussian", 4.0, 0.2, 20)], None)
    account._connection.execute("DELETE FROM charge WHERE number = 3")
    with pytest.raises(ConfigError, match=r"privacy\.sqlite: charges were deleted.* 3 rows were written, 2 are there"):
        PrivacyAccount(file)


def test_an_account_of_an_earlier_release_is_refused_and_kept_by_what_the_refusal_says(tmp_path: Path) -> None:
    file = tmp_path / "privacy.sqlite"
    account = PrivacyAccount(file)
    account.charge_pass(Place("ward", "a", 3), 7, PASS, None)
    for table in ("charge", "unfinished"):
        account._connection.execute(f"ALTER TABLE {table} RENAME COLUMN federation TO run")
    account.close()
    with pytest.raises(ConfigError, match=r"an earlier release made this privacy account, whose column run") as refused:
        PrivacyAccount(file)
    program, place, *statements = shlex.split(str(refused.value).partition("rename the column: ")[2])
    assert (program, place, len(statements)) == ("sqlite3", str(file), 1)
    with sqlite3.connect(file) as connection:
        connection.executescript(statements[0])
    again = PrivacyAccount(file)
    assert again.n_unfinished(Place("ward", "a", 3)) == 1
    assert again.epsilon("record", 1e-5) == pytest.approx(EPSILON)
