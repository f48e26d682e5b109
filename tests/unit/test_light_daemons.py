"""A daemon's own process stays light: what is heavy is loaded by its worker only."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from fednats import cli
from fednats.services import {service}
from fednats.services.daemon import answers
print(sorted({{"torch", "tenseal", "sklearn", "matplotlib"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("service", ["site", "aggregator", "coordinator"])
def test_a_daemon_loads_neither_torch_nor_tenseal(service: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(service=service)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


TRAINING = """
import sys
from types import SimpleNamespace
import fednats.services.site.worker
from fednats.config import DeltaSettings, TrainingSettings
from fednats.privacy.guard import Guard
from fednats.privacy.policy import Policy
run = SimpleNamespace(version=0, training=TrainingSettings(), delta=DeltaSettings())
guard = Guard(SimpleNamespace(run="r", site="a", state_dir=__import__("pathlib").Path(sys.argv[1])), Policy())
guard.check_pass(run, 1.0, None)
guard.charge_pass(run, 1.0, 0, 1)
print(sorted({"opacus", "scipy"} & set(sys.modules)))
"""


def test_a_pass_without_noise_loads_nothing_of_what_noise_needs(tmp_path: Path) -> None:
    """It would stay in the worker's memory beside the model."""
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
