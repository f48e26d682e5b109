"""The ledger of what left: what was written is whole, and whatever is done to it afterwards is found."""

import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nkeys
import pytest
import tomli_w
from typer.testing import CliRunner

from fednats import cli, wire
from fednats.crypto.signers import SignersFile
from fednats.crypto.signing import Signer
from fednats.errors import ConfigError, LocalStorageError
from fednats.ledger import records as egress
from fednats.ledger.anchor import keep_anchor
from fednats.ledger.audit import Audit, audit
from fednats.ledger.page import page
from fednats.ledger.records import BEGIN, EgressLedger, LedgerEntry, hash_of, line_of, parse
from fednats.messages import Receipt, Verdict

SIGNER = Signer(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())
OTHER = Signer(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())
N_UPDATES = 6


def opened(path: Path, signer: Signer = SIGNER) -> EgressLedger:
    return EgressLedger(path, signer, "site.a", "r")


def written(path: Path, signer: Signer = SIGNER) -> Path:
    """Write a ledger of a start, updates with their evaluations, and what is summed up."""
    ledger = opened(path, signer)
    ledger.append(LedgerEntry("started", detail="<b>presence</b> is summed up"))
    for number in range(N_UPDATES):
        ledger.append(
            LedgerEntry("update", number, f"u{number}", 3, 1000 + number, "ab" * 32, 0.5 * number + 0.25),
            LedgerEntry("evaluation", number, n_messages=1, n_bytes=200, digest="cd" * 32),
        )
    ledger.append(LedgerEntry("other", n_messages=12, n_bytes=60))
    ledger.close()
    return path


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return written(tmp_path / "egress-ledger.jsonl")


def changed(ledger: Path, change: Callable[[list[bytes]], list[bytes]]) -> Audit:
    ledger.write_bytes(b"".join(change(ledger.read_bytes().splitlines(keepends=True))))
    return audit(ledger)


def test_a_ledger_is_whole_and_says_what_left(ledger: Path) -> None:
    found = audit(ledger)
    assert found.findings == []
    assert [record.sequence for record in found.records] == list(range(1, 2 * N_UPDATES + 3))
    assert found.n_bytes == {"started": 0, "update": 6015, "evaluation": 1200, "other": 60}
    assert found.epsilon == 2.75
    assert found.line == (
        "14 records by site.a: evaluation 6 (1200 bytes), other 1 (60 bytes), started 1 (0 bytes), update 6 (6015 bytes);"
        " epsilon 2.75; the chain is whole"
    )


def test_a_record_can_be_checked_without_this_software(ledger: Path) -> None:
    """What a line's hash and its chain are, from the words of the document alone."""
    previous = "0" * 64
    for line in ledger.read_text().splitlines():
        without = re.sub(r',"hash":"[0-9a-f]{64}","signature":"[0-9a-f]{128}"}$', "}", line)
        record = json.loads(line)
        assert record["hash"] == hashlib.sha256(without.encode()).hexdigest()
        assert record["previous"] == previous
        previous = record["hash"]


def test_every_flipped_byte_is_found_with_its_line(ledger: Path) -> None:
    whole = ledger.read_bytes()
    chosen = random.Random(1).sample(range(len(whole)), 600)
    for position in {0, len(whole) - 1, *chosen}:
        for mask in (1, 0x20):  # the second makes capital letters of small ones
            altered = bytearray(whole)
            altered[position] ^= mask
            ledger.write_bytes(altered)
            found = audit(ledger)
            assert found.findings, f"byte {position} of {len(whole)}"
            number = whole[:position].count(b"\n") + 1
            assert found.findings[0].startswith(f"line {number}: "), found.findings


@pytest.mark.parametrize("position", range(2 * N_UPDATES + 1))
def test_a_dropped_record_is_found(ledger: Path, position: int) -> None:
    found = changed(ledger, lambda lines: lines[:position] + lines[position + 1 :])
    assert found.findings == [
        f"line {position + 1}: record {position + 2} where {position + 1} was expected: 1 missing before it"
    ]


def test_the_last_record_is_missed_by_no_chain(ledger: Path) -> None:
    """A chain does not say where it ends: `fednats verify` compares with what others have."""
    assert changed(ledger, lambda lines: lines[:-3]).findings == []


def test_swapped_records_are_found(ledger: Path) -> None:
    found = changed(ledger, lambda lines: [*lines[:3], lines[4], lines[3], *lines[5:]])
    assert [text.split(":")[0] for text in found.findings] == ["line 4", "line 5", "line 6"]
    assert "1 missing before it" in found.findings[0]
    assert "out of order, or twice" in found.findings[1]


def test_a_record_that_is_there_twice_is_found(ledger: Path) -> None:
    assert changed(ledger, lambda lines: [*lines[:3], *lines[2:]]).findings[0] == (
        "line 4: record 3 where 4 was expected: out of order, or twice"
    )


def test_a_cut_in_the_middle_is_found(ledger: Path) -> None:
    whole = ledger.read_bytes()
    assert (
        changed(ledger, lambda lines: [*lines[:3], lines[3][:40], *lines[4:]]).findings[0].startswith("line 4: damaged")
    )
    ledger.write_bytes(whole)
    found = changed(ledger, lambda lines: [*lines[:3], lines[3][:40] + b"\n", *lines[4:]])
    assert found.findings[0].startswith("line 4: damaged or altered")


def test_whoever_has_no_key_cannot_mend_what_he_altered(ledger: Path) -> None:
    """Numbers, chain and hashes made anew, and signed with a key of his own: it is not the site's."""

    def forge(lines: list[bytes], *, sign: bool) -> list[bytes]:
        previous, forged = BEGIN, []
        for number, line in enumerate((line for line in lines if b'"u2"' not in line), 1):
            record = parse(line)
            changes = {"sequence": number, "previous": previous, **({"key": OTHER.public_key} if sign else {})}
            content = {**record.model_dump(exclude={"hash", "signature"}), **changes}
            previous = hash_of(content)
            signature = OTHER.signature(egress.DOMAIN, record.by, bytes.fromhex(previous)).hex()
            forged.append(line_of(record.model_copy(update={**content, "hash": previous, "signature": signature})))
        return forged

    whole = ledger.read_bytes()
    assert (
        changed(ledger, lambda lines: forge(lines, sign=False)).findings[0].startswith("line 1: its signature is not")
    )
    ledger.write_bytes(whole)
    found = changed(ledger, lambda lines: forge(lines, sign=True))
    assert found.findings == []
    assert found.notes == [f"signed by {OTHER.public_key}; give --signers to see whose key that is"]
    roster = SignersFile(run="r", epoch=1, keys={"site.a": SIGNER.public_key})
    assert audit(ledger, [roster]).findings == [
        f"records 1 to 13 are signed with {OTHER.public_key}, which is not the key of site.a"
    ]


def test_records_of_a_revoked_or_an_earlier_key_are_known(ledger: Path) -> None:
    """A kit with a new key goes on with the ledger; the file of signers of either epoch knows one of the keys."""
    changed_key = opened(ledger, OTHER)
    changed_key.append(LedgerEntry("update", 9, "u9", 1, 1))
    changed_key.close()
    before = SignersFile(run="r", epoch=1, keys={"site.a": SIGNER.public_key})
    after = SignersFile(run="r", epoch=2, keys={"site.a": OTHER.public_key})
    revoked = after.model_copy(update={"revoked": {"site.a": (SIGNER.public_key,)}})
    twice = SignersFile(run="r", epoch=2, keys={}, revoked={"site.a": (SIGNER.public_key, OTHER.public_key)})
    assert audit(ledger, [before, after]).findings == []
    assert audit(ledger, [revoked]).findings == []
    assert audit(ledger, [revoked]).notes == ["records 1 to 14 are signed with a key of site.a that has been revoked"]
    assert audit(ledger, [twice]).findings == []
    assert len(audit(ledger, [twice]).notes) == 2
    assert len(audit(ledger, [after]).findings) == 1


# --- crashes ----------------------------------------------------------------------------------------------------------


def test_a_line_that_was_cut_short_is_no_tampering_and_the_next_start_removes_it(ledger: Path) -> None:
    whole = ledger.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in (1, len(last) // 2, len(last) - 1):
        ledger.write_bytes(whole[: len(whole) - len(last) + cut])
        found = audit(ledger)
        assert found.findings == []
        assert found.notes[0].startswith("line 14 is cut short")
        mended = opened(ledger)
        assert mended.removed_bytes == cut
        mended.append(LedgerEntry("update", 9, "u9", 1, 1))
        mended.close()
        assert audit(ledger).findings == []
        assert [record.name for record in audit(ledger).records][-1] == "u9"


def test_a_ledger_goes_on_after_a_restart(ledger: Path) -> None:
    for number in range(3):
        again = opened(ledger)
        assert (again.n_records, again.removed_bytes) == (14 + number, 0)
        again.append(LedgerEntry("started"))
        assert again.n_bytes == ledger.stat().st_size
        again.close()
    assert audit(ledger).findings == []


PROGRAM = """
import sys
from pathlib import Path
from fednats.crypto.signing import Signer
from fednats.ledger.records import EgressLedger, LedgerEntry
ledger = EgressLedger(Path(sys.argv[1]), Signer(sys.argv[2]), "site.a", "r")
number = 0
while True:
    number += 1
    ledger.append(LedgerEntry("update", number, f"u{number}", 1, 1, "ab" * 32))
    print(number, flush=True)
"""


def test_a_killed_process_has_on_disk_what_it_said_it_had(tmp_path: Path) -> None:
    seed = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode()
    path = tmp_path / "egress-ledger.jsonl"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, path, seed], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = [int(process.stdout.readline()) for _ in range(40)]
    process.kill()
    said += [int(line) for line in process.stdout.read().splitlines()]
    process.wait()
    process.stdout.close()
    opened(path, Signer(seed)).close()
    found = audit(path)
    assert found.findings == []
    assert len(found.records) >= said[-1]


def test_a_full_disk_leaves_the_ledger_as_it_was(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ledger.read_bytes()
    full = opened(ledger)

    def write_half(file: int, data: bytes) -> None:
        os.write(file, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(egress, "_write", write_half)
        with pytest.raises(LocalStorageError, match="does not leave: make room on its disk"):
            full.append(LedgerEntry("update", 9, "u9", 1, 1))
    assert ledger.read_bytes() == before
    full.append(LedgerEntry("update", 9, "u9", 1, 1))
    full.close()
    assert audit(ledger).findings == []


def test_a_daemon_does_not_go_on_with_a_damaged_ledger(ledger: Path) -> None:
    ledger.write_bytes(ledger.read_bytes()[:-10] + b"xxxxxxxxx\n")
    with pytest.raises(ConfigError, match="its last record cannot be read"):
        opened(ledger)


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 200_000,
        b"{" * 100_000 + b"\n",
        b"\n\n\n",
        b'{"sequence":1}\n',
        b"[" * 60_000 + b"]" * 60_000,
        b"a model",
    ],
)
def test_a_file_of_something_else_is_no_ledger(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.jsonl").write_bytes(data)
    found = audit(tmp_path / "x.jsonl")
    assert found.findings
    assert found.records == []


# --- its end ----------------------------------------------------------------------------------------------------------


REGION = Signer(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())


def accepted_by_region(site_ledger: Path) -> Path:
    """Write the ledger of the region that accepted all updates, each naming the record before its own."""
    records = audit(site_ledger).records
    path = site_ledger.with_name("ledger.jsonl")
    ledger = EgressLedger(path, REGION, "aggregator.north", "r")
    for before, record in itertools.pairwise(records):
        if record.what == "update":
            entry = LedgerEntry("accepted", record.version, record.name, digest=record.digest, detail="from site.a")
            ledger.append(replace(entry, anchors=before.hash))
    ledger.close()
    return path


def test_a_ledger_cut_by_whole_records_is_found_by_the_region_s(ledger: Path) -> None:
    region = accepted_by_region(ledger)
    assert audit(ledger, against=[region]).findings == []
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-5]))
    assert audit(ledger).findings == []
    found = audit(ledger, against=[region]).findings
    assert len(found) == 2
    assert "aggregator.north has accepted u5 (its record 6), which is not here" in found[1]
    code, output = run("verify", ledger, "--against", region)
    assert code == 1
    assert "the end of this ledger is missing" in output


def test_a_ledger_made_anew_with_the_hospital_s_own_key_is_found_by_the_region_s(ledger: Path) -> None:
    region = accepted_by_region(ledger)
    kept = [record for record in audit(ledger).records if record.what == "update"]
    ledger.unlink()
    anew = opened(ledger)
    anew.append(*(LedgerEntry("update", r.version, r.name, r.n_messages, r.n_bytes, r.digest, r.epsilon) for r in kept))
    anew.close()
    assert audit(ledger).findings == []
    found = audit(ledger, against=[region]).findings
    assert len(found) == N_UPDATES
    assert all("as the newest here, and that is not here" in text for text in found)


def test_the_region_s_receipt_beside_a_ledger_finds_that_it_was_cut(ledger: Path) -> None:
    head = audit(ledger).records[-1].hash
    verdict = Verdict(name="u5", sequence=6, outcome="accepted", reason="", detail="", ledger_head=head)
    receipt = Receipt(run="r", region="north", site="a", verdicts=(verdict,))
    keep_anchor(ledger, REGION.sign("fed.r.receipt.north.a", wire.pack(receipt)))
    keys = {"site.a": SIGNER.public_key, "aggregator.north": REGION.public_key}
    roster = SignersFile(run="r", epoch=1, keys=keys)
    assert audit(ledger, [roster]).findings == []
    forged = roster.model_copy(update={"keys": {**keys, "aggregator.north": OTHER.public_key}})
    assert audit(ledger, [forged]).findings == ["the receipt beside it is not signed by aggregator.north"]
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:-1]))
    (finding,) = audit(ledger, [roster]).findings
    assert f"aggregator.north has countersigned record {head[:16]}" in finding


# --- the command line -------------------------------------------------------------------------------------------------


def run(*arguments: str | Path) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, ["audit", *map(str, arguments)])
    return result.exit_code, result.output


def test_verify_ends_with_0_or_with_1_and_the_place(ledger: Path, tmp_path: Path) -> None:
    signers = tmp_path / "signers.toml"
    signers.write_text(tomli_w.dumps({"run": "r", "epoch": 1, "keys": {"site.a": SIGNER.public_key}}))
    code, output = run("verify", ledger, "--signers", signers)
    assert code == 0
    assert output.startswith("14 records by site.a")
    ledger.write_bytes(ledger.read_bytes().replace(b'"n_bytes":1003', b'"n_bytes":1004'))
    code, output = run("verify", ledger, "--signers", signers)
    assert code == 1
    assert "line 8: altered, its hash is of something else" in output
    result = CliRunner().invoke(cli.app, ["audit", "verify", str(tmp_path / "absent.jsonl")])
    assert isinstance(result.exception, ConfigError)
    assert "absent.jsonl: cannot be read" in str(result.exception)


def test_show_prints_every_record(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, output = run("show", ledger)
    assert code == 0
    assert all(f"u{number}" in output for number in range(N_UPDATES))
    assert "the chain is whole" in output


def test_show_says_of_which_run_a_version_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    ledger = opened(tmp_path / "egress-ledger.jsonl")
    ledger.append(
        LedgerEntry("started"),
        LedgerEntry("run", 0, "pilot"),
        LedgerEntry("update", 0, "u0"),
        LedgerEntry("update", 4, "u4"),
    )
    ledger.append(
        LedgerEntry("run", 5, "trial"),
        LedgerEntry("update", 5, "u5"),
        LedgerEntry("update", 4, "u6"),
        LedgerEntry("other"),
    )
    ledger.close()
    found = audit(tmp_path / "egress-ledger.jsonl")
    runs = ["", "pilot", "pilot", "pilot", "trial", "trial", "pilot", ""]
    assert [found.run_of(record.version) for record in found.records] == runs
    _, output = run("show", tmp_path / "egress-ledger.jsonl")
    shown = re.findall(r"│ update *│ (\w+) *│ *(\d) │ (u\d) ", output)
    assert shown == [("pilot", "0", "u0"), ("pilot", "4", "u4"), ("trial", "5", "u5"), ("pilot", "4", "u6")]


def test_the_page_has_totals_days_epsilon_and_all_records_and_loads_nothing(ledger: Path, tmp_path: Path) -> None:
    html = tmp_path / "ledger.html"
    code, output = run("show", ledger, "--html", html)
    assert code == 0
    assert str(html) in output.replace("\n", "")
    text = html.read_text()
    day = audit(ledger).records[0].at[:10]
    assert '<td class="n">6015</td>' in text
    assert f'<td class="">{day}</td>' in text
    assert "<polyline" in text
    assert "at most 2.75" in text
    assert text.count("<tr>") == 3 + 4 + 1 + 14  # heads of the tables; kinds, the day, records
    assert "The chain is whole." in text
    assert not re.search(r"(src|href)=|https?://|<script|<b>", text)


def test_the_page_of_an_altered_ledger_says_so_first(ledger: Path) -> None:
    found = changed(ledger, lambda lines: lines[:3] + lines[4:])
    text = page(found)
    assert "This ledger was altered or damaged." in text
    assert text.index("line 4: record 5") < text.index("By kind")


def test_the_page_of_an_empty_ledger_is_one(tmp_path: Path) -> None:
    (tmp_path / "ledger.jsonl").touch()
    assert "no record" in page(audit(tmp_path / "ledger.jsonl"))
