import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path

import pytest

from tests.support.chaos import SETTLE_S, Kind, could_not_connect, plan

DURATION_S = 300.0
TARGETS = {
    Kind.KILL: ["coordinator", "aggregator-north", "site-a", "site-b"],
    Kind.KILL_SERVER: ["hub", "north"],
    Kind.WIPE_SERVER: ["hub"],
    Kind.FILL_DISK: ["site-a", "site-b"],
    Kind.SET_CLOCK: ["site-a", "site-b"],
    Kind.CUT: ["region-north", "site-a-link"],
    Kind.FLAP: ["region-north", "site-a-link"],
    Kind.REPEAT_SITE: ["a", "b"],
    Kind.REPEAT_REGION: ["north"],
}


def test_a_seed_draws_the_same_faults_and_another_seed_draws_others() -> None:
    first = list(plan(TARGETS, 1, DURATION_S))
    assert list(plan(TARGETS, 1, DURATION_S)) == first
    assert list(plan(TARGETS, 2, DURATION_S)) != first


def test_the_short_form_has_every_kind_of_fault() -> None:
    assert {fault.kind for fault in plan(TARGETS, 1, 30.0)} == set(Kind)


def test_five_minutes_have_every_kind_of_fault_and_several_at_a_time() -> None:
    for seed in range(5):
        faults = list(plan(TARGETS, seed, DURATION_S))
        assert {fault.kind for fault in faults} == set(Kind)
        assert any(later.at_s < fault.at_s + fault.for_s for fault, later in pairwise(faults))


def test_a_target_has_one_fault_at_a_time_and_all_end_in_time() -> None:
    for seed in range(5):
        by_target = sorted(plan(TARGETS, seed, DURATION_S), key=lambda fault: (fault.target, fault.at_s))
        for _target, group in groupby(by_target, key=lambda fault: fault.target):
            faults = list(group)
            for fault, later in pairwise(faults):
                assert later.at_s >= fault.at_s + fault.for_s + SETTLE_S - 0.2  # both are rounded
            assert all(fault.for_s > 0 and fault.at_s + fault.for_s <= DURATION_S + 0.1 for fault in faults)


DYING = """
import sys
from fednats import errors
from fednats.config import DaemonSettings
from fednats.services.daemon.lifecycle import run
from fednats.transport import answer

error = {**vars(errors), **vars(answer)}[sys.argv[1]]

async def body(daemon):
    raise error("as it happens")

run("site", "a", DaemonSettings.model_validate({"run": "r", "state_dir": sys.argv[2], "signers_file": "s"}), body)
"""


@pytest.mark.parametrize("error", ["UnreachableError", "BusError", "AwayError", "TaskError"])
def test_only_a_daemon_that_could_not_connect_is_started_again(error: str, tmp_path: Path) -> None:
    dying = [sys.executable, "-c", DYING, error, str(tmp_path)]
    log = subprocess.run(dying, capture_output=True, text=True, check=True).stderr
    assert '"event": "stopped_by_error"' in log
    assert could_not_connect(log.splitlines()[-1]) == (error == "UnreachableError")
