"""A site whose state is from a backup: from which number it goes on, what it is charged, what its ledger says."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from fednats import subjects, wire
from fednats.config import SiteSettings
from fednats.crypto.signing import Signer
from fednats.errors import BudgetSpentError, OldAccountError
from fednats.ledger.anchor import keep_anchor, missing_heads
from fednats.ledger.audit import audit
from fednats.ledger.records import BEGIN, EGRESS_FILE, EgressLedger, LedgerEntry
from fednats.messages import ModelManifest, Opening, Receipt, Verdict
from fednats.privacy import rdp
from fednats.privacy.account import Paid, PrivacyAccount
from fednats.privacy.guard import Guard, Left, account_file
from fednats.privacy.policy import NO_POLICY, Budget, Policy
from fednats.privacy.skellam import LEAST_VARIANCE
from fednats.protocol.events import Combined
from fednats.protocol.refusals import newest_known
from fednats.services.site.restore import gap_in
from fednats.storage.outbox import Outbox, RestoredOutbox, outbox_file
from fednats.verify.joined import APPLIED, verify
from tests.makers import update
from tests.participants import seed
from tests.small_run import SmallRun
from tests.unit.test_privacy_account import DP_SGD, LAYOUT, SKELLAM, manifest, site, worker
from tests.unit.test_receipts import ACCEPTED, REPLAYED, verdict

RATE = 0.2
STEP = rdp.sampled_gaussian(4.0, RATE)
SIGNER = Signer(seed())


@pytest.mark.parametrize(
    ("verdicts", "known"),
    [
        ([], 0),
        ([verdict("x-3", 3, ACCEPTED), verdict("x-9", 9, ACCEPTED)], 9),
        ([verdict("x-9", 9, "too_stale")], 9),
        ([verdict("garbage", 0, "malformed")], 0),
        ([verdict("mine-7", 7, REPLAYED)], 8),
        ([verdict("x-7", 7, REPLAYED)], 7),
    ],
    ids=["nothing", "accepted", "refused", "unreadable", "own number is another's", "another's is replayed"],
)
def test_the_newest_number_that_a_region_knows(verdicts: Sequence[Verdict], known: int) -> None:
    assert newest_known(verdicts, verdicts, {"mine-7"}, newest=7) == known


# --- the privacy account ----------------------------------------------------------------------------------------------


def charged(tmp_path: Path, run: ModelManifest, numbers: Sequence[int], policy: Policy = NO_POLICY) -> Guard:
    guard = Guard(site(tmp_path), policy)
    for n_made, number in enumerate(numbers):
        guard.charge_pass(run, RATE, n_made, number)
        guard.charge_update(run, LAYOUT, number, dp_sgd=run.training.dp is not None)
    return guard


def account(tmp_path: Path) -> PrivacyAccount:
    return PrivacyAccount(account_file(site(tmp_path), NO_POLICY))


def test_an_account_that_has_paid_for_the_newest_number_is_charged_nothing(tmp_path: Path) -> None:
    run = manifest(training=DP_SGD)
    guard = charged(tmp_path, run, [5, 6, 7])
    guard.catch_up(run, RATE, Left(7))
    assert account(tmp_path).n_charges("record") == 3
    assert account(tmp_path).paid("r", "a") == Paid(sequence=7, version=0)


def test_an_older_account_is_charged_for_each_update_that_may_have_left_since(tmp_path: Path) -> None:
    run = manifest(training=DP_SGD)
    guard = charged(tmp_path, run, [5, 6])
    for _ in range(2):  # once
        guard.catch_up(run, RATE, Left(10))
    spent = guard.spending(run)
    assert spent is not None
    assert spent.record.epsilon == pytest.approx(rdp.epsilon((2 + 4) * 3 * STEP, 1e-5))
    assert (spent.n_unseen, spent.describe(spent=False)["n_unseen"]) == (4, 4)
    assert account(tmp_path).paid("r", "a") == Paid(sequence=10, version=0, n_unseen=4)


def test_the_costliest_settings_of_the_run_count(tmp_path: Path) -> None:
    """The sample rate follows the number of cases, which may have changed; the noise may have been set higher."""
    guard = charged(tmp_path, manifest(training={"dp": {"noise_multiplier": 2.0}}), [5])
    guard.catch_up(manifest(training=DP_SGD), 0.1, Left(6))
    costly = rdp.sampled_gaussian(2.0, RATE)
    assert account(tmp_path).epsilon("record", 1e-5) == pytest.approx(rdp.epsilon((1 + 1) * 3 * costly, 1e-5))


def test_noise_on_whole_deltas_is_charged_as_on_the_coarsest_grid(tmp_path: Path) -> None:
    run = manifest(delta=SKELLAM)
    guard = charged(tmp_path, run, [5])
    before = account(tmp_path).epsilon("site", 1e-5), account(tmp_path).epsilon("record", 1e-5)
    guard.catch_up(run, RATE, Left(7))
    bound = rdp.skellam(4.0, (2.0 * 2**8) ** 2) + 2 * rdp.skellam(4.0, LEAST_VARIANCE)
    after = account(tmp_path).epsilon("site", 1e-5), account(tmp_path).epsilon("record", 1e-5)
    assert after[0] == pytest.approx(rdp.epsilon(bound, 1e-5))
    assert after[0] >= 3 * before[0] / 2
    assert after[1] > before[1]


@pytest.mark.parametrize(
    ("why", "paid", "first_version", "left"),
    [
        ("has no charge of site a in federation r", [], 0, Left(9)),
        ("has no charge since version 4", [5, 6], 4, Left(9)),
        ("by the region's word only", [5, 6], 0, Left(9, signed=False)),
    ],
)
def test_where_no_bound_can_be_given_nothing_is_trained(
    tmp_path: Path, why: str, paid: list[int], first_version: int, left: Left
) -> None:
    """A region that lies about numbers must not spend a hospital's budget; settings of an earlier run are not known."""
    guard = charged(tmp_path, manifest(training=DP_SGD), paid)
    opening = Opening(name="r", first_version=first_version, opened_at=first_version)
    run = manifest(training=DP_SGD).model_copy(update={"opening": opening, "version": first_version})
    with pytest.raises(OldAccountError, match=rf"privacy-a\.sqlite: .*{why}.* number 9 may have left.*newest copy"):
        guard.catch_up(run, RATE, left)
    assert account(tmp_path).n_charges("record") == len(paid)


def test_a_region_s_word_is_enough_for_one_update_that_was_perhaps_sent_in_part(tmp_path: Path) -> None:
    """With a new kit the updates of before are signed with another key; the account is that of the hospital."""
    run = manifest(training=DP_SGD)
    guard = charged(tmp_path, run, [5, 6])
    guard.catch_up(run, RATE, Left(7, signed=False))
    assert account(tmp_path).n_charges("record") == 3


def test_what_was_spent_since_the_backup_may_be_more_than_is_left(tmp_path: Path) -> None:
    run = manifest(training=DP_SGD)
    budget = Budget(max_epsilon=rdp.epsilon(4 * 3 * STEP, 1e-5))
    guard = charged(tmp_path, run, [5, 6], Policy(budget=budget))
    with pytest.raises(BudgetSpentError, match=r"lacks what 3 updates have cost, up to number 9.* more than is left"):
        guard.catch_up(run, RATE, Left(9))
    assert account(tmp_path).n_charges("record") == 2


def test_a_run_without_noise_costs_nothing(tmp_path: Path) -> None:
    Guard(site(tmp_path), NO_POLICY).catch_up(manifest(), RATE, Left(9))
    assert not account_file(site(tmp_path), NO_POLICY).exists()


# --- the worker -------------------------------------------------------------------------------------------------------


def passes(settings: SiteSettings, run: ModelManifest, n: int) -> list[int]:
    made = worker(settings)
    numbers = []
    for _ in range(n):
        made.train(run, False)  # noqa: FBT003 - as the daemon calls it
        numbers.append(made.encode(run).sequence)
    made._outbox.close()
    if made._guard._opened is not None:
        made._guard._opened.close()
    return numbers


def from_backup(settings: SiteSettings, tmp_path: Path, known: int, *, with_account: bool) -> None:
    """Put back what `backup` copied, as its operator does; then the daemon finds ``known`` on the bus."""
    state, file = settings.state_dir, account_file(settings, NO_POLICY)
    shutil.rmtree(state)
    shutil.copytree(tmp_path / "backup", state)
    if with_account:
        shutil.copy(tmp_path / file.name, file)
    outbox = Outbox(outbox_file(state))
    found = RestoredOutbox(first=known + 2, own=outbox.newest_number(), signed=known, known=known, base_version=0)
    outbox.go_above(found)
    outbox.close()


def backup(settings: SiteSettings, tmp_path: Path) -> None:
    shutil.copytree(settings.state_dir, tmp_path / "backup")
    if (file := account_file(settings, NO_POLICY)).exists():
        shutil.copy(file, tmp_path / file.name)


@pytest.mark.parametrize("with_account", [True, False], ids=["with an older account", "with the newest account"])
def test_a_restored_site_pays_for_what_it_has_sent_before_it_trains(tmp_path: Path, *, with_account: bool) -> None:
    """Whether or not the account is from the backup, it has paid in the end for all that may have left."""
    settings, run = site(tmp_path), manifest(training=DP_SGD)
    passes(settings, run, 2)
    backup(settings, tmp_path)
    known = passes(settings, run, 3)[-1]
    from_backup(settings, tmp_path, known, with_account=with_account)
    (number,) = passes(settings, run, 1)
    assert number == known + 2
    perhaps_sent_in_part = 1
    paid = account(tmp_path).paid("r", "a")
    assert paid == Paid(number, 0, n_unseen=perhaps_sent_in_part + (3 if with_account else 0))
    rate = worker(settings)._trainer.sample_rate(run.training)
    steps = 3 * (2 + 3 + perhaps_sent_in_part + 1)
    spent = account(tmp_path).epsilon("record", 1e-5)
    assert spent == pytest.approx(rdp.epsilon(steps * rdp.sampled_gaussian(4.0, rate), 1e-5), rel=0.01)


def test_an_account_that_is_older_than_the_outbox_beside_it_is_charged_for_its_updates(tmp_path: Path) -> None:
    settings, run = site(tmp_path), manifest(training=DP_SGD)
    passes(settings, run, 1)
    backup(settings, tmp_path)
    passes(settings, run, 2)
    file = account_file(settings, NO_POLICY)
    shutil.copy(tmp_path / file.name, file)
    passes(settings, run, 1)
    paid = account(tmp_path).paid("r", "a")
    assert paid is not None
    assert paid.n_unseen == 2


def test_updates_of_a_run_without_noise_are_not_charged_in_the_next_run(tmp_path: Path) -> None:
    settings, plain = site(tmp_path), manifest()
    passes(settings, plain, 1)
    backup(settings, tmp_path)
    known = passes(settings, plain, 2)[-1]
    from_backup(settings, tmp_path, known, with_account=False)
    passes(settings, plain, 1)
    passes(settings, manifest(training=DP_SGD), 1)
    assert account(tmp_path).n_charges("record") == 1


# --- the egress ledger ------------------------------------------------------------------------------------------------


def ledger_of(path: Path, n_records: int) -> EgressLedger:
    ledger = EgressLedger(path, SIGNER, "site.a", "r")
    for number in range(n_records):
        ledger.append(LedgerEntry("update", version=number, name=f"a-{number}"))
    return ledger


def countersigned(ledger: Path, head: str) -> None:
    told = Verdict(name="a-9", sequence=9, outcome="accepted", reason="", detail="", ledger_head=head)
    receipt = Receipt(run="r", region="north", site="a", verdicts=(told,))
    keep_anchor(ledger, SIGNER.sign(subjects.receipt("r", "north", "a"), wire.pack(receipt)))


async def test_a_ledger_that_lacks_a_record_which_was_named_says_so_once(tmp_path: Path) -> None:
    path = tmp_path / "egress-ledger.jsonl"
    ledger = ledger_of(path, 2)
    shutil.copy(path, tmp_path / "backup")
    ledger.append(LedgerEntry("update", version=2, name="a-2"), LedgerEntry("update", version=3, name="a-3"))
    lost = ledger.head
    ledger.close()
    countersigned(path, lost)
    outbox = Outbox(tmp_path / "outbox.sqlite")
    assert await gap_in(path, outbox, None) is None
    shutil.copy(tmp_path / "backup", path)
    assert missing_heads(path, BEGIN) == [lost]
    (cut,) = audit(path).findings
    assert "the end of this ledger is missing" in cut

    entry = await gap_in(path, outbox, None)
    assert entry is not None
    restored = EgressLedger(path, SIGNER, "site.a", "r")
    restored.append(entry)
    assert await gap_in(path, outbox, None) is None
    found = audit(path)
    assert found.findings == []
    (gap,) = found.gaps
    assert gap.startswith(
        "record 3: this ledger, or the state beside it, is from a backup: what left since is not here"
    )
    assert lost in gap
    assert "1 findings" in found.line
    restored.append(LedgerEntry("update", version=4, name="a-4"))
    assert audit(path).gaps == [gap], "it stays on record"


async def test_a_ledger_beside_an_outbox_from_a_backup_says_which_updates_it_may_lack(tmp_path: Path) -> None:
    path = tmp_path / "egress-ledger.jsonl"
    ledger_of(path, 2).close()
    found = RestoredOutbox(first=12, own=4, signed=10, known=10, base_version=3)
    entry = await gap_in(path, Outbox(tmp_path / "outbox.sqlite"), found)
    assert entry is not None
    assert "updates 5 to 10 of this site may be among it" in entry.detail


async def test_the_newest_update_names_a_record_that_must_be_on_the_ledger(tmp_path: Path) -> None:
    """Only the ledger was put back, and the region has judged nothing since."""
    path = tmp_path / "egress-ledger.jsonl"
    ledger = ledger_of(path, 2)
    outbox = Outbox(tmp_path / "outbox.sqlite")
    outbox.add_update(update("a"), (1.0,), None)
    outbox.offer("a-1", ledger.head)
    assert await gap_in(path, outbox, None) is None
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0])
    entry = await gap_in(path, outbox, None)
    assert entry is not None
    assert json.loads(lines[1])["hash"] in entry.detail


# --- the run's ledger -------------------------------------------------------------------------------------------------


async def test_the_books_of_a_run_say_what_a_restored_site_lacks(tmp_path: Path) -> None:
    run = SmallRun(tmp_path)
    run.rounds(2)
    state, kept = tmp_path / "site-a", tmp_path / "backup"
    waiting = run.send("north", "a")  # and not sent to its end when the backup is made
    run.outboxes["a"]._database.connection.execute("UPDATE outgoing SET sent_at = NULL WHERE sequence = 3")
    run.outboxes["a"].close()
    shutil.copytree(state, kept)
    run.outboxes["a"] = Outbox(outbox_file(state))
    run.outboxes["a"].mark_sent(waiting.update_id)
    combination, aggregate = run.sum_up("north", waiting, run.send("north", "b"))
    run.regions["north"].feed(run.now_s, Combined(combination_id=combination.combination_id))
    run.apply(aggregate)
    run.rounds(2)
    run.outboxes["a"].close()
    run.ledgers["a"].close()
    shutil.rmtree(state)
    kept.rename(state)

    restored = run.outboxes["a"] = Outbox(outbox_file(state))
    found = RestoredOutbox(first=20, own=3, signed=5, known=5, base_version=4)
    restored.go_above(found)
    entry = await gap_in(state / EGRESS_FILE, restored, found)
    assert entry is not None
    run.ledgers["a"] = EgressLedger(state / EGRESS_FILE, SIGNER, "site.a", "r")
    run.ledgers["a"].append(entry)
    run.rounds(1)
    ledger = verify(tmp_path)
    assert ledger.findings == []
    assert ledger.accepted.keys() == {APPLIED}
    assert [note for note in ledger.notes if note.startswith("restored: ")] == [
        "restored: a from a backup; 3 updates that it lacks are known from the journal of north"
    ]
    assert any("site-a/egress-ledger.jsonl: record 4: " in note for note in ledger.notes)
    run.outboxes["a"]._database.connection.execute("DELETE FROM restored")
    assert any("with a gap" in finding for finding in verify(tmp_path).findings), "that it is known is what excuses it"
