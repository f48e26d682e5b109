"""Any change of a signed message, however small, is refused before it is parsed."""

import os

import nkeys
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fednats import subjects, wire
from fednats.crypto.signing import Signer, public_key, verified
from fednats.errors import Reason, RefusedError
from tests.makers import aggregate, update

SIGNER = Signer(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())
KEY = public_key(SIGNER.public_key)
SUBJECT = subjects.head(subjects.update("r", "north", "a"))
SIGNED = [SIGNER.sign(SUBJECT, wire.pack(message)) for message in (update("a"), aggregate("north"))]


@given(st.sampled_from(SIGNED), st.data())
def test_a_flipped_byte_is_refused(signed: bytes, data: st.DataObject) -> None:
    position = data.draw(st.integers(0, len(signed) - 1))
    mask = data.draw(st.integers(1, 255))
    altered = bytearray(signed)
    altered[position] ^= mask
    assert verified(KEY, SUBJECT, signed) == signed[:-64]
    with pytest.raises(RefusedError) as raised:
        verified(KEY, SUBJECT, bytes(altered))
    assert raised.value.reason is Reason.SIGNATURE


@given(st.sampled_from(SIGNED), st.data())
def test_cut_or_lengthened_it_is_refused(signed: bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(signed) - 1))
    for altered in (signed[:cut], signed[cut + 1 :], signed + signed[cut:]):
        with pytest.raises(RefusedError):
            verified(KEY, SUBJECT, altered)


@given(st.binary(max_size=300), st.text(max_size=30), st.text(max_size=30))
def test_no_two_subjects_and_contents_are_signed_alike(content: bytes, subject: str, other: str) -> None:
    signed = SIGNER.sign(subject, content)
    assert verified(KEY, subject, signed) == content
    if subject != other:
        with pytest.raises(RefusedError):
            verified(KEY, other, signed)
