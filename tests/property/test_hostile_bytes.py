"""Whatever arrives: a result or a typed refusal, in bounded time and memory, and never the end of the process."""

import contextlib
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fednats import wire
from fednats.codec import frames
from fednats.config import DeltaSettings
from fednats.crypto import secret
from fednats.crypto.public import PublicKey
from fednats.delta import scheme
from fednats.errors import Reason, RefusedError
from fednats.messages import Aggregate, Evaluation, ModelManifest, Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import Combine, ContributionArrived, EvaluationArrived, SumEvaluations
from fednats.protocol.sums import head_of, weigh
from fednats.storage.tensor_file import TensorFile
from tests import hostile, mutations
from tests.killing import kills_when_added, kills_when_decrypted

ROOT = Path(__file__).parents[2]
SHORT = 4_000
COUNT = int(os.environ.get("FUZZ_COUNT", "100000"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))


def fuzz(seed: int, count: int, folder: Path, timeout_s: float) -> dict[str, Any]:
    """Run the loop in a process of its own, which may neither crash, nor hang, nor take more memory than stated."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.hostile", str(seed), str(count), str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    at = folder / "at"
    where = at.read_text() if at.exists() else "before the first input"
    assert process.returncode == 0, (
        f"ended with {process.returncode} at {where} of seed {seed}\n{process.stderr[-3000:]}"
    )
    figures: dict[str, Any] = json.loads(process.stdout)
    return figures


def check(figures: dict[str, Any], count: int) -> None:
    assert figures["n"] == count
    assert figures["longest"][0] < hostile.LIMIT_S
    outcomes = figures["outcomes"]
    decoders = {name.split()[0] for name in outcomes}
    never_refused = {"presence", "chunk_file", "machine"}  # they take the sound part of whatever there is
    assert {f"{name} refused" for name in decoders - never_refused} <= outcomes.keys()
    assert {f"{name} taken" for name in decoders} <= outcomes.keys(), "a fuzzer whose input never passes tests nothing"


def test_hostile_bytes_are_refused_within_time_and_memory(tmp_path: Path) -> None:
    check(fuzz(1, SHORT, tmp_path, 120), SHORT)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_hostile_bytes_in_the_long_form(tmp_path: Path) -> None:
    figures = fuzz(SEED, COUNT, tmp_path, 3500)
    print(json.dumps(figures, indent=1))  # noqa: T201 - make fuzz shows it
    check(figures, COUNT)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5),
    max_leaves=30,
)
EXPECTED = st.sampled_from([type(message) for message in hostile.MESSAGES])


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=300), expected=EXPECTED)
def test_any_bytes_are_a_message_or_refused(data: bytes, expected: type[Update]) -> None:
    for candidate in (data, struct.pack(">2sBBI", b"FN", wire.SCHEMA_VERSION, 0, len(data)) + data):
        with pytest.raises(RefusedError):
            wire.unpack(candidate, expected)


@settings(max_examples=50, deadline=None)
@given(fields=st.dictionaries(st.sampled_from(sorted(Update.model_fields)) | st.text(max_size=5), VALUES, max_size=16))
def test_any_fields_are_refused_by_name(fields: dict[str, Any]) -> None:
    body = msgpack.packb(["update", fields])
    with pytest.raises(RefusedError) as refused:
        wire.unpack(struct.pack(">2sBBI", b"FN", wire.SCHEMA_VERSION, 0, len(body)) + body, Update)
    assert len(refused.value.detail) < 1000


# --- what was found, one by one ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "item", [b"\x80", b"\x91\xc0", b"\xa2ab", b"\xc4\x02xx"], ids=["maps", "lists", "text", "bytes"]
)
def test_a_kilobyte_that_unpacks_to_millions_of_values_is_refused(item: bytes) -> None:
    n = 2**16
    lists = (b"\xdd" + struct.pack(">I", n) + item * n) * (wire.MAX_MESSAGE_BYTES // (n * len(item) + 5) - 1)
    body = b"\xdd" + struct.pack(">I", lists.count(b"\xdd\x00\x01\x00\x00")) + lists
    data = mutations.enveloped(random.Random(3), body)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(RefusedError) as refused:
        wire.unpack(data, Update)
    assert refused.value.reason is Reason.OVERSIZED
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < hostile.ROOM_BYTES


def test_a_version_of_a_trillion_does_not_count_to_it() -> None:
    with pytest.raises(RefusedError, match="no way from version"):
        frames.cheapest(hostile.MANIFEST.frames, 3, 2**40)


@pytest.mark.parametrize("shape", [(-1,), (2**41,), (1,) * 17, (2**40, 2)])
def test_a_manifest_of_an_impossible_model_is_refused(shape: tuple[int, ...]) -> None:
    spec = hostile.SPECS[0].model_copy(update={"shape": shape})
    manifest = hostile.MANIFEST.model_copy(update={"parameters": (spec,)})
    with pytest.raises(RefusedError) as refused:
        wire.unpack(wire.pack(manifest), ModelManifest)
    assert refused.value.reason is Reason.MALFORMED


def region() -> Collector:
    machine = Collector(Roster("r", "north", frozenset(("a", "b")), frozenset()), lambda event: event.settings.goal)
    machine.handle(hostile.ANNOUNCED)
    return machine


def test_figures_that_together_pass_every_limit_do_not_end_the_region() -> None:
    """Two sites that claim as many samples as a message can say: the head of their sum is still one."""
    machine = region()
    commands = []
    for site in ("a", "b"):
        claimed = {"site": site, "update_id": site, "n_samples": 2**40, "saturated": 2**40}
        commands += machine.handle(ContributionArrived(head=hostile.UPDATE.model_copy(update=claimed)))
    (combine,) = (command for command in commands if isinstance(command, Combine))
    head = head_of("r", "north", combine.combination, weigh(combine.combination, 500), hostile.PAYLOAD)
    assert wire.unpack(wire.pack(head), Aggregate).n_samples == 2**40


def test_metrics_that_together_pass_every_limit_do_not_end_the_region() -> None:
    machine = region()
    commands = []
    for site in ("a", "b"):
        claimed = {"site": site, "n_samples": 2**40, "metrics": {"auc": 1e15}}
        evaluation = hostile.EVALUATION.model_copy(update=claimed)
        commands += machine.handle(EvaluationArrived(evaluation=wire.unpack(wire.pack(evaluation), Evaluation)))
    (summed,) = (command for command in commands if isinstance(command, SumEvaluations))
    assert hostile.evaluation_sum(summed).metrics["auc"] == pytest.approx(1e15)
    huge = hostile.EVALUATION.model_copy(update={"metrics": {"auc": 1e300}})
    with pytest.raises(RefusedError):
        wire.unpack(wire.pack(huge), Evaluation)


def test_a_model_file_with_a_deep_header_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    path.write_bytes((10**6).to_bytes(8, "little") + b"[" * 10**6)
    with pytest.raises(Exception, match=r"deep\.safetensors: cannot be read as a model"):
        TensorFile.read(path)


# --- what TenSEAL itself would do -------------------------------------------------------------------------------------

TENSEAL_ALONE = """
import tenseal as ts
from tests.killing import {kills}
context = ts.context(ts.SCHEME_TYPE.BFV, 4096, 1032193, n_threads=1)
read = ts.bfv_vector_from(context, {kills}(context))
{use}
"""


@pytest.mark.parametrize(
    ("kills", "use"),
    [(kills_when_decrypted, "read.decrypt()"), (kills_when_added, "ts.bfv_vector(context, [1] * 4096) + read")],
    ids=["decrypt", "add"],
)
def test_bytes_that_kill_tenseal_are_refused_here(kills: Callable[[Any], bytes], use: str) -> None:
    """TenSEAL believes what it reads; nothing that others wrote is given to it to read."""
    alone = subprocess.run(
        [sys.executable, "-c", TENSEAL_ALONE.format(kills=kills.__name__, use=use)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
    )
    assert alone.returncode == -signal.SIGSEGV, (
        "TenSEAL has learned to check: the careful way may not be needed any more"
    )
    bfv = scheme.bfv(DeltaSettings())
    _, public_key = secret.generate(bfv.parameters)
    key = PublicKey(public_key, bfv.parameters)
    data = kills(key._context)
    total = key.weighted_sum()
    with pytest.raises(RefusedError, match=f"a ciphertext has {bfv.parameters.ciphertext_bytes}") as refused:
        total.add(data, 1)
    assert refused.value.reason is Reason.CIPHERTEXT
    for start in (
        0,
        len(data) - bfv.parameters.ciphertext_bytes,
    ):  # cut to the right length: one like any other, or none
        with contextlib.suppress(RefusedError):
            total.add(data[start : start + bfv.parameters.ciphertext_bytes], 1)
