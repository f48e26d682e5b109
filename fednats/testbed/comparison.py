"""What the federation is worth: each hospital alone, and all data pooled, with as many steps as a site took."""

import asyncio
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fednats.learning.baseline import Pooled, train_alone
from fednats.learning.evaluation import evaluate
from fednats.learning.task import Task
from fednats.learning.task_code import make_task
from fednats.testbed.federation import FederationSettings

Metrics = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Metrics on everybody's test cases."""

    federated: Metrics
    alone: Mapping[str, Metrics]
    pooled: Metrics

    @property
    def mean_alone(self) -> Metrics:
        """Mean over the hospitals of each metric that all of them have."""
        names = set.intersection(*(set(metrics) for metrics in self.alone.values()))
        return {name: float(np.mean([metrics[name] for metrics in self.alone.values()])) for name in sorted(names)}


async def compare(federation: FederationSettings, weights: NDArray[np.float32], n_steps: int) -> Comparison:
    """Train alone and pooled for ``n_steps`` local steps each; evaluate them and ``weights`` float32[n] alike."""
    loop = asyncio.get_running_loop()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_one_thread) as pool:
        pooled = loop.run_in_executor(pool, _train_pooled, federation, n_steps)
        alone = [loop.run_in_executor(pool, _train_one, federation, site, n_steps) for site in federation.sites]
        federated = loop.run_in_executor(pool, evaluate_pooled, federation, weights)
        results = await asyncio.gather(*alone)
        return Comparison(
            federated=await federated, alone=dict(zip(federation.sites, results, strict=True)), pooled=await pooled
        )


def _one_thread() -> None:
    torch.set_num_threads(1)


def _tasks(federation: FederationSettings) -> list[Task]:
    settings = [federation.task_of(site) for site in federation.sites]
    return [make_task(task.path, task.options) for task in settings]


def _train_one(federation: FederationSettings, site: str, n_steps: int) -> Metrics:
    settings = federation.task_of(site)
    task = make_task(settings.path, settings.options)
    return evaluate_pooled(federation, train_alone(task, federation.training, n_steps, federation.seed))


def _train_pooled(federation: FederationSettings, n_steps: int) -> Metrics:
    pooled = Pooled(_tasks(federation))
    return evaluate_pooled(federation, train_alone(pooled, federation.training, n_steps, federation.seed))


def evaluate_pooled(federation: FederationSettings, weights: NDArray[np.float32]) -> Metrics:
    """Return the metrics of ``weights``, float32[n], on the test cases of all hospitals together."""
    return evaluate(Pooled(_tasks(federation)), weights, seed=federation.seed).metrics
