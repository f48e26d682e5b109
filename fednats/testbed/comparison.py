"""Compare the federation with each hospital alone and with all data pooled, for as many steps as a site took.

A comparison may fail without failing the run; its row then says why.
"""

import asyncio
import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fednats.errors import FednatsError, HospitalError
from fednats.learning.baseline import PooledTask, train_alone
from fednats.learning.evaluation import evaluate
from fednats.learning.task import Task
from fednats.learning.task_code import make_task
from fednats.learning.task_errors import task_code
from fednats.testbed.federation import FederationSettings

Metrics = dict[str, float]
Job = Callable[[], Metrics]

LOG_FILE = "comparison.log"
"""File below the output folder with the full errors of comparisons that failed."""


@dataclass(frozen=True)
class Worth:
    """Metrics of one model on the test cases of all hospitals, or why there are none."""

    metrics: Metrics
    failed: str = ""
    """The error, in words that quote no data; empty if there was none."""
    details: str = ""
    """Text and traceback of the error; they may quote a record."""


@dataclass(frozen=True)
class Comparison:
    """The federation, each hospital alone and all data pooled, as far as they are measured."""

    federated: Worth
    alone: Mapping[str, Worth] = field(default_factory=dict)
    pooled: Worth = Worth({})

    @property
    def mean_alone(self) -> Metrics:
        """Mean of each metric over the hospitals that did not fail, if all of these have it."""
        measured = [worth.metrics for worth in self.alone.values() if not worth.failed]
        names = set.intersection(*map(set, measured)) if measured else set()
        return {name: float(np.mean([metrics[name] for metrics in measured])) for name in sorted(names)}


@dataclass(frozen=True)
class Measure:
    """Measures in separate processes; writes failures to `LOG_FILE` below ``output``."""

    federation: FederationSettings
    output: Path

    async def federated(self, weights: NDArray[np.float32]) -> Comparison:
        """Evaluate ``weights``, float32[n], on the test cases of all hospitals."""
        (worth,) = await self._worths([_Federated(self.federation, weights)])
        return Comparison(worth)

    async def baselines(self, measured: Comparison, n_steps: int) -> Comparison:
        """Add each hospital alone and all data pooled to ``measured``, each trained for ``n_steps`` local steps."""
        sites = tuple(self.federation.sites)
        alone = [_Alone(self.federation, (site,), n_steps) for site in sites]
        pooled, *worths = await self._worths([_Alone(self.federation, sites, n_steps), *alone])
        return Comparison(measured.federated, dict(zip(sites, worths, strict=True)), pooled)

    async def _worths(self, jobs: Sequence[Job]) -> list[Worth]:
        loop = asyncio.get_running_loop()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_one_thread) as pool:
            done = [loop.run_in_executor(pool, _worth, job) for job in jobs]
            worths = await asyncio.gather(*map(_of_living_process, done))
        details = [worth.details for worth in worths if worth.failed]
        if details:
            with (self.output / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write("\n".join(details))
        return worths


@dataclass(frozen=True)
class _Federated:
    federation: FederationSettings
    weights: NDArray[np.float32]

    def __call__(self) -> Metrics:
        return evaluate_pooled(self.federation, self.weights)


@dataclass(frozen=True)
class _Alone:
    """Trains on the pooled data of ``sites``, without a federation."""

    federation: FederationSettings
    sites: tuple[str, ...]
    n_steps: int

    def __call__(self) -> Metrics:
        task = PooledTask(_tasks(self.federation, self.sites))
        weights = train_alone(task, self.federation.training, self.n_steps, self.federation.seed)
        return evaluate_pooled(self.federation, weights)


def _worth(job: Job) -> Worth:
    try:
        with task_code("training"):
            return Worth(job())
    except HospitalError as error:
        return Worth({}, error.public, f"{error}\n{error.traceback}")
    except FednatsError as error:
        return Worth({}, str(error), str(error))


async def _of_living_process(done: "asyncio.Future[Worth]") -> Worth:
    try:
        return await done
    except BrokenProcessPool as error:
        return Worth({}, "its process ended; see the system's log for a signal or memory", str(error))


def _one_thread() -> None:
    torch.set_num_threads(1)


def _tasks(federation: FederationSettings, sites: Sequence[str]) -> list[Task]:
    settings = [federation.task_of(site) for site in sites]
    return [make_task(task.path, task.options) for task in settings]


def evaluate_pooled(federation: FederationSettings, weights: NDArray[np.float32]) -> Metrics:
    """Return the metrics of ``weights``, float32[n], on the test cases of all hospitals together."""
    with task_code("evaluating"):
        tasks = _tasks(federation, tuple(federation.sites))
        return evaluate(PooledTask(tasks), weights, seed=federation.seed).metrics
