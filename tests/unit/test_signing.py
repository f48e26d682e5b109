"""Signatures: whose key, over what, for which subject, of which run; and who is revoked."""

import asyncio
import os
from pathlib import Path

import nkeys
import pytest
import structlog

from fednats import subjects, wire
from fednats.crypto.signers import Signers
from fednats.crypto.signing import SIGNATURE_BYTES, Signer, public_key, verified
from fednats.errors import ConfigError, Reason, RefusedError
from fednats.messages import Control, Update
from fednats.services.daemon import identity as identities
from fednats.services.daemon.identity import Identity
from tests.makers import FIRST, update
from tests.participants import Participants, seed
from tests.support.connected_bus import until

HEAD = subjects.head(subjects.update("r", "north", "a"))
PACKED = wire.pack(update("a"))


@pytest.fixture
def them(tmp_path: Path) -> Participants:
    return Participants(tmp_path)


def refusal(signers: Signers, subject: str, data: bytes) -> str:
    with pytest.raises(RefusedError) as raised:
        signers.opened(subject, data)
    assert raised.value.reason is Reason.SIGNATURE
    return raised.value.detail


def test_what_the_sender_signed_is_taken_and_is_the_same_each_time(them: Participants) -> None:
    signed = them.signer("site.a").sign(HEAD, PACKED)
    assert len(signed) == len(PACKED) + SIGNATURE_BYTES
    assert signed == them.signer("site.a").sign(HEAD, PACKED)
    assert Signers(them.file, "r").opened(HEAD, signed) == PACKED
    assert them.identity("aggregator.north").open(HEAD, signed, Update) == update("a")


def test_nobody_can_publish_under_the_id_of_another_s_message_first(them: Participants) -> None:
    """A stream takes a message under an id that it knows for one sent again, whoever sent it."""
    ids = [wire.message_id(them.signer(name).sign(HEAD, PACKED)) for name in ("site.a", "site.b", "site.a")]
    assert ids[0] == ids[2] != ids[1]


def test_a_key_is_read_as_nkeys_reads_it(them: Participants) -> None:
    theirs = nkeys.from_seed(bytearray(them.seeds["site.a"], "ascii"))
    assert them.signer("site.a").public_key == theirs.public_key.decode()
    content = b"what nats-server has its users sign"
    public_key(them.signer("site.a").public_key).verify(theirs.sign(content), content)


@pytest.mark.parametrize("signer", ["site.b", "aggregator.north", "coordinator.hub"])
def test_nobody_signs_for_another(them: Participants, signer: str) -> None:
    signed = them.signer(signer).sign(HEAD, PACKED)
    assert "signature is not the sender's" in refusal(Signers(them.file, "r"), HEAD, signed)


def test_a_signature_is_for_one_subject_and_so_for_one_run(them: Participants) -> None:
    signers = Signers(them.file, "r")
    signed = them.signer("site.a").sign(HEAD, PACKED)
    for other in (
        subjects.head(subjects.update("other-run", "north", "a")),
        subjects.head(subjects.update("r", "south", "a")),
        subjects.evaluation("r", "north", "a"),
    ):
        refusal(signers, other, signed)
        assert signers.opened(other, them.signer("site.a").sign(other, PACKED)) == PACKED


def test_a_signature_for_another_purpose_is_none(them: Participants) -> None:
    """nats-server has its users sign a challenge of its choice with the very same key."""
    theirs = nkeys.from_seed(bytearray(them.seeds["site.a"], "ascii"))
    refusal(Signers(them.file, "r"), HEAD, PACKED + theirs.sign(PACKED))
    refusal(Signers(them.file, "r"), HEAD, PACKED + them.signer("site.a").signature(b"another purpose", HEAD, PACKED))


@pytest.mark.parametrize("data", [b"", b"short", bytes(SIGNATURE_BYTES), PACKED, PACKED + bytes(SIGNATURE_BYTES)])
def test_what_is_not_signed_is_refused(them: Participants, data: bytes) -> None:
    refusal(Signers(them.file, "r"), HEAD, data)


def test_models_and_control_are_the_coordinator_s_alone(them: Participants) -> None:
    subject = subjects.control("r")
    control = Control(run="r", opening=FIRST, status="closed", version=3, reason="x")
    site = them.identity("site.a")
    assert site.open(subject, them.identity("coordinator.hub").sign(subject, control), Control) == control
    for name in ("aggregator.north", "site.b", "site.a"):
        with pytest.raises(RefusedError, match="signature"):
            site.open(subject, them.identity(name).sign(subject, control), Control)


def test_a_stranger_is_refused_by_name(them: Participants) -> None:
    subject = subjects.head(subjects.update("r", "north", "nobody"))
    detail = refusal(Signers(them.file, "r"), subject, Signer(seed()).sign(subject, PACKED))
    assert detail == "site.nobody is not among the signers of the run"


def test_a_revoked_signer_is_refused_once_the_file_says_so(them: Participants) -> None:
    signers = Signers(them.file, "r")
    signed = them.signer("site.a").sign(HEAD, PACKED)
    assert not signers.reread()
    them.write(epoch=2, revoked={"site.a": [them.signer("site.a").public_key]})
    assert signers.opened(HEAD, signed) == PACKED
    assert signers.reread()
    assert refusal(signers, HEAD, signed) == "site.a is revoked"
    assert signers.roster.epoch == 2


def test_a_new_key_counts_and_the_old_one_does_not(them: Participants) -> None:
    old = them.signer("site.a")
    them.seeds["site.a"] = seed()
    them.write(epoch=2, revoked={"site.a": [old.public_key]})
    signers = Signers(them.file, "r")
    refusal(signers, HEAD, old.sign(HEAD, PACKED))
    assert signers.opened(HEAD, them.signer("site.a").sign(HEAD, PACKED)) == PACKED


async def test_a_daemon_notices_a_change_and_survives_a_damaged_file(
    them: Participants, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identities, "REREAD_S", 0.01)
    identity = them.identity("site.a")
    with structlog.testing.capture_logs() as lines:
        following = asyncio.create_task(identity.follow_signers(structlog.get_logger()))
        them.replace("run = ")

        async def logged(event: str) -> bool:
            return any(line["event"] == event for line in lines)

        await until(lambda: logged("signers_unreadable"))
        signed = them.signer("coordinator.hub").sign(subjects.control("r"), PACKED)
        assert identity._signers.opened(subjects.control("r"), signed) == PACKED
        revoked = ("coordinator.hub", "site.a")
        them.write(epoch=2, revoked={name: [them.signer(name).public_key] for name in revoked})
        await until(lambda: logged("signers_changed"))
        await until(lambda: logged("own_key_revoked"))
        following.cancel()
    refusal(identity._signers, subjects.control("r"), signed)
    assert [line["revoked"] for line in lines if line["event"] == "signers_changed"] == [list(revoked)]
    assert len([line for line in lines if line["event"] == "signers_unreadable"]) == 1


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"run": "other"}, "is of run 'other'"),
        ({"keys": {"site.a": "UNKEY"}}, "keys.site.a: not a public nkey"),
        ({"keys": {}}, "has no key for site.a"),
        ({"colour": "red"}, "colour: unknown setting"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error_that_says_so(
    them: Participants, changes: dict[str, object], expected: str
) -> None:
    them.write(**changes)
    with pytest.raises(ConfigError) as raised:
        them.identity("site.a")
    assert expected in str(raised.value)
    assert str(them.file) in str(raised.value)


def test_a_daemon_whose_seed_is_another_s_does_not_start(them: Participants) -> None:
    them.seeds["site.a"] = seed()
    with pytest.raises(ConfigError, match=r"has another key than bus\.nkey_seed_file for site\.a"):
        them.identity("site.a")


def test_a_daemon_whose_key_is_revoked_does_not_start(them: Participants) -> None:
    them.write(revoked={"site.a": [them.signer("site.a").public_key]})
    with pytest.raises(ConfigError, match=r"has revoked the key of site\.a; ask for a new kit"):
        them.identity("site.a")


def test_a_daemon_without_a_seed_does_not_start(them: Participants, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"bus\.nkey_seed_file: missing"):
        Identity("site.a", "r", None, them.file)
    (tmp_path / "bad.nk").write_text("no seed")
    with pytest.raises(ConfigError, match="is not an nkey seed"):
        Identity("site.a", "r", tmp_path / "bad.nk", them.file)


@pytest.mark.parametrize("change", ["lower", "checksum", "account", "longer", "other letters"])
def test_only_a_user_s_nkey_is_a_key(them: Participants, change: str) -> None:
    nkey = them.signer("site.a").public_key
    account: bytes = nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_ACCOUNT)
    wrong = {
        "lower": nkey.lower(),
        "checksum": nkey[:-1] + ("A" if nkey[-1] != "A" else "B"),
        "account": Signer(account.decode()).public_key,
        "longer": nkey + "A" * 8,
        "other letters": "ü" + nkey[1:],
    }[change]
    with pytest.raises(ValueError, match="public nkey"):
        public_key(wrong)


def test_verified_returns_what_was_signed(them: Participants) -> None:
    signer = them.signer("site.a")
    assert verified(public_key(signer.public_key), HEAD, signer.sign(HEAD, b"")) == b""
