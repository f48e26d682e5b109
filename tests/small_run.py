"""The books of a small run, written by the machines themselves: two regions of two sites each, and the hub."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgpack
import nkeys

from fednats.config import AggregationSettings, RunSettings, StalenessSettings
from fednats.crypto.signing import Signer
from fednats.ledger.records import EGRESS_FILE, EgressLedger
from fednats.messages import Aggregate, Opening, ParameterSpec, Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.coordinator import Coordinator
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    Command,
    Configured,
    ContributionArrived,
    Event,
    FinalEvaluationOverdue,
    WallTimeReached,
)
from fednats.protocol.sums import head_of, weigh
from fednats.services.daemon.recorder import entry_of
from fednats.storage.checkpoints import Checkpoint, Checkpoints, checkpoints_folder
from fednats.storage.journal import EVENTS_TABLE, Journal
from fednats.storage.outbox import Outbox
from fednats.storage.row_chain import extend
from fednats.storage.tensor_file import digest_of
from tests.makers import FIRST, PAYLOAD, announcement, closed, opened, update

CAPACITY = 500
SETTINGS = AggregationSettings(goal=2, region_goal=1, staleness=StalenessSettings(max_staleness=5))
SIGNER = Signer(nkeys.encode_seed(os.urandom(32), nkeys.PREFIX_BYTE_USER).decode())
REGIONS = {"north": ("a", "b"), "south": ("c", "d")}


class Node:
    """One daemon's machine and journal; it is fed until no combination is under way, or left in the middle of one."""

    def __init__(self, file: Path, machine: Collector | Coordinator) -> None:
        self.journal = Journal(file)
        self.machine = machine

    def feed(self, at_s: float, *events: Event) -> Combination | None:
        """Journal and handle ``events``; return the combination asked for."""
        self.journal.append(events, at_s)
        commands: list[Command] = [command for event in events for command in self.machine.handle(event)]
        return next((command.combination for command in commands if isinstance(command, Combine)), None)


class SmallRun:
    """Runs rounds of a federation without a bus."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.now_s = 1000.0
        self.version = 0
        self.opening = FIRST
        self.hub = Node(directory / "coordinator" / "journal.sqlite", Coordinator("r"))
        self.regions = {
            region: Node(
                directory / f"aggregator-{region}" / "journal.sqlite",
                Collector(Roster("r", region, frozenset(), frozenset()), lambda event: event.settings.goal),
            )
            for region in REGIONS
        }
        self.outboxes = {
            site: Outbox(directory / f"site-{site}" / "outbox.sqlite") for sites in REGIONS.values() for site in sites
        }
        self.ledgers = {
            site: EgressLedger(directory / f"site-{site}" / EGRESS_FILE, SIGNER, f"site.{site}", "r")
            for site in self.outboxes
        }
        self.hub.feed(self.now_s, Configured(sites=(), regions=tuple(REGIONS)), opened())
        for region, sites in REGIONS.items():
            self.regions[region].feed(self.now_s, Configured(sites=sites, regions=()))
        self.announce(0, made_by="")

    def announce(self, version: int, made_by: str) -> None:
        """Let the coordinator write a checkpoint and everybody hear of it."""
        self.checkpoint(version, made_by)
        self.version = version
        told = partial(announcement, version, settings=SETTINGS, opening=self.opening, grids=(self.grid,))
        self.hub.feed(self.now_s, told(capacity=None))
        for region in self.regions.values():
            region.feed(self.now_s, told(capacity=CAPACITY))

    def end(self) -> None:
        """Let the coordinator close the run, and everybody hear of it."""
        self.hub.feed(self.now_s, WallTimeReached(), FinalEvaluationOverdue())
        for region in self.regions.values():
            region.feed(self.now_s, closed(self.opening, self.version))

    def begin(self, name: str) -> None:
        """Let the coordinator open a run, or go on with the one that it closed last, and not get any further."""
        first = self.opening.first_version if name == self.opening.name else self.version + 1
        self.opening = Opening(name=name, first_version=first, opened_at=self.version + 1)
        self.hub.feed(self.now_s, opened(self.opening))

    @property
    def grid(self) -> str:
        """Id of the run's grid."""
        return f"g{self.opening.first_version}"

    def checkpoint(self, version: int, made_by: str, quarantined: Mapping[str, str] = MappingProxyType({})) -> None:
        folder = checkpoints_folder(self.directory / "coordinator")
        checkpoints = Checkpoints(folder, [ParameterSpec(name="w", shape=(1,))], ())
        weights, state = checkpoints.create(version)
        digest = digest_of(weights)
        checkpoints.commit(
            Checkpoint(
                version=version,
                opening=self.opening,
                settings=RunSettings(name="r"),
                n_steps=version,
                made_by=made_by,
                weights_digest=digest,
                frozen_digests=b"",
                grids=(),
                frames=(),
                quarantined=dict(quarantined),
            ),
            weights,
            state,
        )

    def send(self, region: str, site: str, *, n_samples: int = 100) -> Update:
        """Let a site make an update and have it acknowledged by the bus."""
        outbox = self.outboxes[site]
        sequence = outbox.next_sequence()
        head = update(site, sequence, version=self.version, n_samples=n_samples, grid=self.grid)
        head = head.model_copy(update={"region": region})
        outbox.add_update(head, (1.0,), None)
        entry = entry_of("update", head, version=head.base_version, name=head.update_id, payload=head.payload)
        self.ledgers[site].append(entry)
        outbox.mark_sent(head.update_id)
        return head

    def sum_up(self, region: str, *heads: Update) -> tuple[Combination, Aggregate]:
        """Let a region take ``heads`` in, and publish a sum of them that it has not journalled yet."""
        self.now_s += 1
        combination = None
        for head in heads:
            combination = self.regions[region].feed(self.now_s, ContributionArrived(head=head)) or combination
        assert combination is not None
        weights = weigh(combination, CAPACITY)
        return combination, head_of("r", region, combination, weights, PAYLOAD)

    def apply(self, aggregate: Aggregate, norm: float = 1.0) -> None:
        """Let the coordinator take a sum in and make a version of it, or without it if its norm is an outlier."""
        self.now_s += 1
        combination = self.hub.feed(self.now_s, ContributionArrived(head=aggregate))
        assert combination is not None
        assert isinstance(self.hub.machine, Coordinator)
        norms = {aggregate.aggregate_id: norm}
        quarantined = self.hub.machine.outliers(combination, norms)
        self.announce(self.version + 1, combination.combination_id)
        done = Combined(combination_id=combination.combination_id, norms=norms, quarantined=quarantined)
        self.hub.feed(self.now_s, done)

    def rounds(self, count: int) -> None:
        """Let every region send a sum ``count`` times, and the coordinator apply each."""
        for _ in range(count):
            for region, sites in REGIONS.items():
                heads = [self.send(region, site, n_samples=100 + 7 * len(site)) for site in sites]
                combination, aggregate = self.sum_up(region, *heads)
                self.regions[region].feed(self.now_s, Combined(combination_id=combination.combination_id))
                self.apply(aggregate)

    # --- tampering ----------------------------------------------------------------------------------------------------

    def tamper(self, node: str, change: Callable[[list[list[Any]]], Sequence[Sequence[Any]]]) -> None:
        """Rewrite a journal: ``change`` gets rows of at_s, kind, fields and returns those to be kept, renumbered."""
        connection = (self.hub if node == "hub" else self.regions[node]).journal._connection
        rows = [
            [at_s, kind, msgpack.unpackb(body)]
            for at_s, kind, body in connection.execute("SELECT at_s, kind, body FROM event ORDER BY sequence")
        ]
        kept = change(rows)
        connection.execute("DELETE FROM event")
        connection.executemany(
            "INSERT INTO event (at_s, kind, body) VALUES (?, ?, ?)",
            written := [(at_s, kind, msgpack.packb(fields)) for at_s, kind, fields in kept],
        )
        connection.execute("DELETE FROM row_chain")  # whoever can write the file can make the count anew
        extend(connection, EVENTS_TABLE, written)
