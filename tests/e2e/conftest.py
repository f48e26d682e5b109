"""Small federations with the task in ``tests/e2e/own_task.py``, on the breast cancer data of scikit-learn."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer

from fednats.config import parse
from fednats.testbed.federation import FederationSettings

OWN_TASK = Path(__file__).parent / "own_task.py"
NORMED = Path(__file__).parent / "normed"
"""A task in a folder: a network with batch norm and one logit."""

MakeFederation = Callable[..., FederationSettings]

ENDING_S = 10.0


LONGEST = ("test_faults_bus", "test_soak", "test_big_model", "test_participation", "test_bad_input", "test_liars")
"""Modules to begin first, so that no long test is left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest tests first."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(autouse=True)
def _nothing_left_running(tmp_path: Path) -> Iterator[None]:
    """Assert that all processes of a test have ended with it, even those whose parent it killed."""
    yield
    deadline = time.monotonic() + ENDING_S
    while left := users_of(tmp_path):
        assert time.monotonic() < deadline, f"still running: {left}"
        time.sleep(0.05)


def users_of(folder: Path) -> dict[int, str]:
    """Return the other processes that have ``folder`` or a file below it open, as all daemons and servers have.

    The result maps process ids to command lines.
    """
    users = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            files = [str(file.readlink()) for file in (process / "fd").iterdir()]
            command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended, or belongs to another user
        if int(process.name) != os.getpid() and any(f"{file}/".startswith(f"{folder}/") for file in files):
            users[int(process.name)] = command
    return users


@pytest.fixture
def make_federation(tmp_path: Path) -> MakeFederation:
    """Return a maker of federations: ``make_federation({"north": ["a", "b"]}, stop={"max_versions": 3})``."""

    def make(sites_by_region: dict[str, list[str]], **changes: Any) -> FederationSettings:
        sites = [(site, region) for region, names in sites_by_region.items() for site in names]
        features, labels = load_breast_cancer(return_X_y=True)
        features = (features - features.mean(0)) / features.std(0)
        rows = np.column_stack([features, labels])[np.random.default_rng(0).permutation(len(labels))]
        parts = np.array_split(rows, len(sites))
        raw: dict[str, Any] = {
            "name": "small",
            "task": f"{OWN_TASK}:MyTask",
            "training": {"local_steps": 20, "batch_size": 16, "learning_rate": 0.05},
            "server": {"learning_rate": 1.0},
            "regions": {region: {} for region in sites_by_region},
            "sites": {},
        }
        for (site, region), part in zip(sites, parts, strict=True):
            file = tmp_path / f"{site}.csv"
            np.savetxt(file, part, delimiter=",")
            raw["sites"][site] = {"region": region, "options": {"csv": str(file)}}
        return parse({**raw, **changes}, FederationSettings, source="test")

    return make
