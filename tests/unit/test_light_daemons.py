"""A daemon's own process stays light: what is heavy is loaded by its worker only."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from fednats import cli
from fednats.services import {service}, answers
print(sorted({{"torch", "tenseal", "sklearn", "matplotlib"}} & set(sys.modules)))
"""


@pytest.mark.parametrize("service", ["site", "aggregator", "coordinator"])
def test_a_daemon_loads_neither_torch_nor_tenseal(service: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(service=service)], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
