"""Run a whole federation on this machine: servers, daemons, progress, comparison and report."""

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fednats.config import DaemonSettings
from fednats.errors import FednatsError, InterruptedRunError, RunFailedError
from fednats.learning.entries import entries_of
from fednats.learning.flat import initial_model
from fednats.learning.task_code import make_task
from fednats.learning.task_errors import task_code
from fednats.learning.whole_model import write_whole_model
from fednats.provision.plan import Plan
from fednats.storage.checkpoints import checkpoints_folder, newest_checkpoint, weights_file
from fednats.storage.tensor_file import TensorFile
from fednats.testbed.bus_servers import BusServers, region_link, serving
from fednats.testbed.comparison import Comparison, Measure
from fednats.testbed.federation import FederationSettings
from fednats.testbed.links import serving_links
from fednats.testbed.processes import LOG_FILE, DaemonProcess, Daemons
from fednats.testbed.progress import Progress
from fednats.testbed.report import write_report
from fednats.testbed.summary import Statuses, Summary, run_figures, summarise, with_newest
from fednats.testbed.supervisor import Supervisor
from fednats.testbed.timeline import Timeline
from fednats.testbed.wan import Wan, WanSettings
from fednats.verify.joined import settled

POLL_S = 0.5
COORDINATOR = "coordinator"
KITS = "kits"


@dataclass
class Running:
    """A running federation."""

    servers: BusServers
    daemons: Daemons
    output: Path

    @property
    def links(self) -> Mapping[str, Wan]:
        """Links by name: ``region-NAME`` (leaf links), ``site-NAME``, and those that `running` was given."""
        return self.servers.links

    @property
    def wan_bytes(self) -> int:
        """Bytes that have crossed the leaf links, both ways."""
        leaf_links = [self.links[name] for name in map(region_link, self.servers.leaves) if name in self.links]
        return sum(link.bytes_up + link.bytes_down for link in leaf_links)


@asynccontextmanager
async def running(
    federation: FederationSettings, output: Path, links: Mapping[str, WanSettings] | None = None
) -> AsyncIterator[Running]:
    """Start servers and daemons; stop them all at the end, whatever happened.

    ``links`` add to the federation's own links, or replace them; `bus_servers.link_names` has their names.
    """
    wans = {**federation.links(), **(links or {})}
    async with (
        serving(_plan(federation, output), output / KITS, wans) as servers,
        serving_links(servers.links, output),
        Daemons(_daemons(federation, output, servers)) as daemons,
    ):
        yield Running(servers, daemons, output)


async def run_federation(federation: FederationSettings, output: Path) -> Summary:
    """Run to the end, then compare and write summary, report and model below ``output``; return the summary.

    Raises:
        RunFailedError: the coordinator ended the run because it could not go on; for example, no site could train.
        InterruptedRunError: the run was interrupted by SIGINT or SIGTERM.
        FednatsError: a process keeps ending, ``output`` holds a run already, or the settings do not work.
    """
    with private_files():
        return await _run_federation(federation, output)


@contextmanager
def private_files() -> Iterator[None]:
    """Make files of this process and its children private, because models are learned from patients' data."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


async def _run_federation(federation: FederationSettings, output: Path) -> Summary:
    started = time.monotonic()
    _refuse_used(output)
    await asyncio.to_thread(_refuse_unsuitable, federation)
    timeline = Timeline()
    async with running(federation, output) as federation_running:
        supervisor = Supervisor([*federation_running.servers.servers, *federation_running.daemons])
        statuses = await _watch(federation, federation_running, supervisor, timeline, started)
        await federation_running.daemons.stop("site")  # the others take in the sites' last messages
        await settled(output)
    weights = await asyncio.to_thread(_keep_model, federation, output)
    refuse_failed(statuses, output)
    mean_updates = sum(int(statuses[f"site-{name}"]["updates"]) for name in federation.sites) / len(federation.sites)
    n_steps = max(1, round(mean_updates * federation.training.local_steps))
    figures = run_figures(federation, statuses, federation_running.wan_bytes, timeline, supervisor.restarts)

    def write(comparison: Comparison) -> Summary:
        summary = summarise(figures, comparison, time.monotonic() - started)
        summary.write(output / "summary.json")
        write_report(summary, output / "report.html")
        return summary

    measure = Measure(federation, output)
    federated = await measure.federated(weights)
    write(federated)  # kept if the baselines fail
    return write(await measure.baselines(federated, n_steps))


def refuse_failed(statuses: Statuses, output: Path) -> None:
    """Raise RunFailedError if the coordinator ended the run because it could not go on."""
    coordinator = statuses[COORDINATOR]
    if coordinator["failed"]:
        failing = [name for name, status in statuses.items() if status["role"] == "site" and status.get("failing")]
        log = output / min(failing, default=COORDINATOR) / LOG_FILE
        raise RunFailedError(f"the run ended at version {coordinator['version']}: {coordinator['reason']}; see {log}")


async def _watch(
    federation: FederationSettings, running_now: Running, supervisor: Supervisor, timeline: Timeline, started: float
) -> Statuses:
    """Show progress until the coordinator closes the run, and restart processes that end; return the last statuses."""
    interrupted = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupted.set)
    statuses: Statuses = {}
    try:
        names = [daemon.name for daemon in running_now.daemons]
        with Progress(federation.name, federation.task, federation.stop, names) as progress:
            while statuses.get(COORDINATOR, {}).get("state") != "closed":
                await supervisor.mend()
                statuses = with_newest(statuses, await running_now.daemons.statuses())
                progress.update(statuses, time.monotonic() - started, supervisor.restarts)
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
    """Return the plan for the kits; a policy that names no privacy account gets one in the folder of the run."""
    plan = federation.plan()
    policies = {
        name: policy.model_copy(update={"privacy_account": policy.privacy_account or output / f"privacy-{name}.sqlite"})
        for name, policy in plan.site_policies.items()
    }
    return plan.model_copy(update={"site_policies": policies})


def _daemons(federation: FederationSettings, output: Path, servers: BusServers) -> list[DaemonProcess]:
    """Return all daemons with the settings of their kits, but with state beside the kits and task code in place."""

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


def _refuse_unsuitable(federation: FederationSettings) -> None:
    """Raise before the start if the model cannot be sent, or cannot be trained with differential privacy as asked."""
    task = federation.task_of(None)
    with task_code("making the model"):
        model = initial_model(make_task(task.path, task.options), federation.seed)
    entries_of(model)
    if federation.training.dp is not None:
        from fednats.privacy.dp_sgd import refuse_unsuitable  # noqa: PLC0415 - opacus is loaded where a run asks for it

        refuse_unsuitable(model)


def _keep_model(federation: FederationSettings, output: Path) -> NDArray[np.float32]:
    """Write the whole model of the last version to ``model.safetensors``; return its trained weights, float32[n]."""
    folder = checkpoints_folder(output / COORDINATOR)
    newest = newest_checkpoint(folder)
    if newest is None:
        raise FednatsError(f"{output}: the coordinator left no model version")
    task = federation.task_of(None)
    with TensorFile.read(weights_file(folder, newest.version)) as file:
        weights = file[0 : len(file)]
    write_whole_model(
        output / "model.safetensors", make_task(task.path, task.options), federation.seed, weights, newest.version
    )
    return weights
