"""Run a whole federation on this machine: servers, daemons, progress, comparison, report."""

import asyncio
import shutil
import signal
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fednats.config import DaemonSettings, TaskSettings
from fednats.errors import FednatsError, InterruptedRunError
from fednats.learning.task_code import make_task
from fednats.provision.plan import Plan
from fednats.storage.checkpoints import checkpoints_folder, newest_checkpoint, weights_file
from fednats.storage.tensor_file import TensorFile
from fednats.testbed.bus_servers import BusServers, region_link, serving
from fednats.testbed.comparison import compare
from fednats.testbed.federation import FederationSettings
from fednats.testbed.ledger import settled
from fednats.testbed.links import serving_links
from fednats.testbed.processes import DaemonProcess, Daemons
from fednats.testbed.progress import Progress
from fednats.testbed.report import write_report
from fednats.testbed.summary import Statuses, Summary, run_figures, summarise, with_newest
from fednats.testbed.timeline import Timeline
from fednats.testbed.wan import Wan, WanSettings

POLL_S = 0.5
COORDINATOR = "coordinator"
KITS = "kits"


@dataclass
class Running:
    """A federation that runs."""

    servers: BusServers
    daemons: Daemons
    output: Path

    @property
    def links(self) -> Mapping[str, Wan]:
        """By name: ``region-NAME`` is its leaf link, ``site-NAME`` its connection, and what was asked for."""
        return self.servers.links

    @property
    def wan_bytes(self) -> int:
        """What has crossed the leaf links, both ways."""
        leaf_links = [self.links[name] for name in map(region_link, self.servers.leaves) if name in self.links]
        return sum(link.bytes_up + link.bytes_down for link in leaf_links)


@asynccontextmanager
async def running(
    federation: FederationSettings, output: Path, links: Mapping[str, WanSettings] | None = None
) -> AsyncIterator[Running]:
    """Start everything; stop everything on the way out, whatever happened.

    ``links`` are beyond or instead of the federation's own; their names are `bus_servers.link_names`.
    """
    wans = {**federation.links(), **(links or {})}
    async with (
        serving(_plan(federation, output), output / KITS, wans) as servers,
        serving_links(servers.links, output),
        Daemons(_daemons(federation, output, servers)) as daemons,
    ):
        yield Running(servers, daemons, output)


async def run_federation(federation: FederationSettings, output: Path) -> Summary:
    """Run to the end, compare, write summary, report and model below ``output``; return the summary.

    Raises:
        FednatsError: a daemon died, or the settings do not work.
    """
    started = time.monotonic()
    _refuse_used(output)
    if federation.training.dp is not None:
        await asyncio.to_thread(_refuse_unsuitable, federation.task_of(None))
    timeline = Timeline()
    async with running(federation, output) as federation_running:
        statuses = await _watch(federation, federation_running, timeline, started)
        if statuses[COORDINATOR]["failed"]:
            raise FednatsError(f"the run was closed: {statuses[COORDINATOR]['reason']}")
        await federation_running.daemons.stop("site")  # what they still send is taken in by those that go on
        await settled(output)
    weights = await asyncio.to_thread(_keep_model, output)
    mean_updates = sum(int(statuses[f"site-{name}"]["updates"]) for name in federation.sites) / len(federation.sites)
    n_steps = max(1, round(mean_updates * federation.training.local_steps))
    comparison = await compare(federation, weights, n_steps)
    figures = run_figures(federation, statuses, federation_running.wan_bytes, timeline)
    summary = summarise(figures, comparison, time.monotonic() - started)
    summary.write(output / "summary.json")
    write_report(summary, output / "report.html")
    return summary


async def _watch(federation: FederationSettings, running_now: Running, timeline: Timeline, started: float) -> Statuses:
    """Show progress until the coordinator has closed the run; return the last statuses."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    statuses: Statuses = {}
    try:
        names = [daemon.name for daemon in running_now.daemons]
        with Progress(federation.name, federation.task, federation.stop, names) as progress:
            while statuses.get(COORDINATOR, {}).get("state") != "closed":
                running_now.daemons.check()
                statuses = with_newest(statuses, await running_now.daemons.statuses())
                progress.update(statuses, time.monotonic() - started)
                timeline.note(statuses, time.monotonic() - started)
                try:
                    async with asyncio.timeout(POLL_S):
                        await interrupted.wait()
                    raise InterruptedRunError("interrupted; everything was stopped")
                except TimeoutError:
                    pass
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return statuses


def _plan(federation: FederationSettings, output: Path) -> Plan:
    """Return what the kits are made from; a privacy account that no policy names is in the folder of the run."""
    plan = federation.plan()
    policies = {
        name: policy.model_copy(update={"privacy_account": policy.privacy_account or output / f"privacy-{name}.sqlite"})
        for name, policy in plan.site_policies.items()
    }
    return plan.model_copy(update={"site_policies": policies})


def _daemons(federation: FederationSettings, output: Path, servers: BusServers) -> list[DaemonProcess]:
    """Return everybody's daemon with the settings of its kit; state is beside the kits, a task's code where it is."""

    def daemon(role: str, name: str, settings: DaemonSettings, **changes: object) -> DaemonProcess:
        return DaemonProcess(role, name, settings.model_copy(update={"state_dir": output / name, **changes}))

    daemons = [daemon("coordinator", COORDINATOR, servers.coordinator_settings(), task=federation.task_of(None))]
    daemons += [
        daemon("aggregator", f"aggregator-{name}", servers.aggregator_settings(name)) for name in federation.regions
    ]
    for name, site in federation.sites.items():
        own = {"task": federation.task_of(name), "slow_factor": site.slow_factor}
        daemons.append(daemon("site", f"site-{name}", servers.site_settings(name), **own))
    return daemons


def _refuse_used(output: Path) -> None:
    if (output / COORDINATOR).exists():
        raise FednatsError(f"{output} holds a federation already; give another --output or remove it")


def _refuse_unsuitable(task: TaskSettings) -> None:
    """Say now, and not at every site, what in the model cannot be trained with differential privacy."""
    from fednats.privacy.dp_sgd import refuse_unsuitable  # noqa: PLC0415 - opacus is loaded where a run asks for it

    refuse_unsuitable(make_task(task.path, task.options).model())


def _keep_model(output: Path) -> NDArray[np.float32]:
    """Copy the last version to ``model.safetensors``; return its weights, float32[n]."""
    folder = checkpoints_folder(output / COORDINATOR)
    newest = newest_checkpoint(folder)
    if newest is None:
        raise FednatsError(f"{output}: the coordinator left no model version")
    shutil.copyfile(weights_file(folder, newest.version), output / "model.safetensors")
    with TensorFile.read(output / "model.safetensors") as weights:
        return weights[0 : len(weights)]
