"""The nodes of a federation in virtual time: the daemons' state machines over an event queue in place of a bus."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from fednats.codec import grid as grids
from fednats.delta.decode import decoder
from fednats.delta.encode import encoder
from fednats.delta.robust import bound_norms
from fednats.delta.sum import summer
from fednats.learning.server_optimizer import ServerOptimizer
from fednats.messages import Aggregate, Grid, Update
from fednats.protocol import site as protocol
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
    DeadlineReached,
    Event,
    Refuse,
    RunOpened,
    StartTimer,
    contribution_id,
)
from fednats.protocol.sums import head_of, weigh
from fednats.testbed.virtual_world import PublishedVersion, Weights, World

Send = Callable[[Event], None]


class Learner(Protocol):
    """Trains at one site."""

    @property
    def n_samples(self) -> int:
        """Number of training cases."""

    def learn(self, weights: Weights, seed: int) -> Weights:
        """Return the delta of one local pass, float32[n_parameters]."""


class SiteNode:
    """A site, which trains on the newest version it has, at most once on each, like a site's daemon."""

    def __init__(self, world: World, name: str, region: str, learner: Learner, train_s: float, send: Send) -> None:
        self._world = world
        self._name = name
        self._region = region
        self._learner = learner
        self._train_s = train_s
        self._send = send
        self._machine = protocol.Site()
        self._newest: PublishedVersion | None = None
        self._sent = 0
        self._residual = np.zeros(world.layout.n_parameters, np.float32)

    def see(self, version: PublishedVersion) -> None:
        """Take up a new version."""
        self._newest = version
        self._start(self._machine.handle(protocol.ModelSeen(version.number)))

    def _start(self, job: protocol.Job | None) -> None:
        while isinstance(job, protocol.Evaluate):
            job = self._machine.handle(protocol.Done())
        if job is not None and self._newest is not None:
            self._world.clock.after(self._train_s, partial(self._trained, self._newest))

    def _trained(self, base: PublishedVersion) -> None:
        world = self._world
        grid = (self._newest or base).grids[-1]
        self._sent += 1
        identity = f"{self._name}-{self._sent}"
        seed = _seed(world.settings.seed, identity)
        encode = encoder(world.settings.delta, None)
        delta = self._learner.learn(base.weights, seed)
        encoded = encode.encode(delta, self._residual.copy(), world.layout, grid, np.random.default_rng(seed))
        chunks = []
        n_saturated = 0
        for chunk in encoded:
            self._residual[chunk.start : chunk.stop] = chunk.residual
            chunks.append(chunk.data)
            n_saturated += chunk.n_saturated
        head = Update(
            run=world.settings.name,
            region=self._region,
            site=self._name,
            update_id=identity,
            sequence=self._sent,
            base_version=base.number,
            grid_id=grid.grid_id,
            key_id=encode.key_id,
            n_samples=self._learner.n_samples,
            saturated=n_saturated,
            min_sites=1,
            payload=world.keep(identity, chunks),
        )
        self._send(ContributionArrived(head=head))
        self._start(self._machine.handle(protocol.Done()))


class RegionNode:
    """A region: its state machine, and the work that its aggregator does for that."""

    def __init__(
        self, world: World, name: str, sites: frozenset[str], registered: Mapping[str, int], send: Send
    ) -> None:
        self.combined: list[Combination] = []
        """All sums that the region sent."""
        self._world = world
        self._name = name
        self._send = send
        self._machine = Collector(
            Roster(world.settings.name, name, sites, frozenset(), registered), lambda event: event.settings.goal
        )
        self._n_timers = 0

    def see(self, version: PublishedVersion) -> None:
        """Take up a new version."""
        self.feed(self._world.announcement(version, capacity=self._world.settings.delta.max_total_weight))

    def feed(self, event: Event) -> None:
        """Handle ``event`` and execute the commands that follow."""
        for command in self._machine.handle(event):
            self._execute(command)

    def _execute(self, command: Command) -> None:
        match command:
            case Combine(combination):
                self._world.clock.after(0.0, partial(self._combine, combination))
            case Refuse():
                self._world.refuse(command)
            case StartTimer(delay_s):
                self._n_timers += 1
                self._world.clock.after(delay_s, partial(self._reach_deadline, self._n_timers))
            case _:
                pass

    def _reach_deadline(self, timer: int) -> None:
        if timer == self._n_timers:  # a new timer replaces the old one
            self.feed(DeadlineReached())

    def _combine(self, combination: Combination) -> None:
        world = self._world
        add = summer(world.settings.delta, None)
        heads = [part.head for part in combination.parts if isinstance(part.head, Update)]
        weights = weigh(combination, add.max_total_weight)
        payloads = [world.payloads.pop(head.update_id) for head in heads]
        chunks = self._sum(list(zip(*payloads, strict=True)), weights)
        identity = combination.combination_id
        head = head_of(world.settings.name, self._name, combination, weights, world.keep(identity, chunks))
        self.combined.append(combination)
        self._send(ContributionArrived(head=head))
        self.feed(Combined(combination_id=identity))

    def _sum(self, positions: Sequence[Sequence[bytes]], weights: Sequence[int]) -> list[bytes]:
        """Sum the chunks of several updates, position by position."""
        world, settings = self._world, self._world.settings.aggregation
        add = summer(world.settings.delta, None)
        left = [world.layout.n_parameters - position * add.values_per_chunk for position in range(len(positions))]
        sizes = [min(add.values_per_chunk, n) for n in left]
        if settings.robust == "none":
            ones = (1,) * len(weights)
            return [
                add.weighted_sum(chunks, weights, sum(weights), n, ones)
                for chunks, n in zip(positions, sizes, strict=True)
            ]
        squares = [add.squares(chunks, n) for chunks, n in zip(positions, sizes, strict=True)]
        factors = bound_norms([float(np.sqrt(sum(of_one))) for of_one in zip(*squares, strict=True)])
        return [
            add.robust_sum(chunks, weights, n, settings, factors) for chunks, n in zip(positions, sizes, strict=True)
        ]


class CoordinatorNode:
    """The coordinator: its state machine, and the work that its daemon does for that."""

    def __init__(
        self, world: World, regions: Sequence[str], weights: Weights, spread: Callable[[PublishedVersion], None]
    ) -> None:
        self.combined: list[Combination] = []
        """The combination behind each version after the first."""
        self.norms: dict[str, float] = {}
        """L2 norm of every sum, by id."""
        self._world = world
        self._regions = tuple(regions)
        self._spread = spread
        self._machine = Coordinator(world.settings.name)
        self._decoder = decoder(world.settings.delta, None)
        self._optimizer = ServerOptimizer(world.settings.server, synchronous=world.settings.aggregation.synchronous)
        self._slots = {name: np.zeros_like(weights) for name in self._optimizer.slots}
        first = grids.initial(world.layout, weights, self._decoder.qmax)
        self.versions = [PublishedVersion(0, 0.0, weights, (first,))]

    def start(self) -> None:
        """Publish the first version."""
        run = self._world.settings
        self.feed(Configured(sites=(), regions=self._regions))
        self.feed(RunOpened(opening=self._world.opening, settings=run))
        self._publish(self.versions[0])

    def feed(self, event: Event) -> None:
        """Handle ``event`` and execute the commands that follow."""
        for command in self._machine.handle(event):
            match command:
                case Combine(combination):
                    self._world.clock.after(0.0, partial(self._combine, combination))
                case Refuse():
                    self._world.refuse(command)
                case _:
                    pass

    def _publish(self, version: PublishedVersion) -> None:
        self.feed(self._world.announcement(version, capacity=None))
        self._spread(version)

    def _combine(self, combination: Combination) -> None:
        layout, current = self._world.layout, self.versions[-1]
        by_id = {grid.grid_id: grid for grid in current.grids}
        deltas: dict[str, Weights] = {}
        for part in combination.parts:
            if isinstance(head := part.head, Aggregate):
                chunks = self._world.payloads.pop(head.aggregate_id)
                deltas[head.aggregate_id] = self._decoder.mean(chunks, head.total_weight, layout, by_id[head.grid_id])
        norms = {identity: float(np.linalg.norm(delta)) for identity, delta in deltas.items()}
        quarantined = self._machine.outliers(combination, norms)
        if quarantined:
            combination = self._machine.without(combination, quarantined)
        parts = combination.parts
        heads = [part.head for part in parts if isinstance(part.head, Aggregate)]
        total = sum(part.mass for part in parts)
        mean = np.zeros(layout.n_parameters, np.float32)
        for part in parts:
            mean += deltas[contribution_id(part.head)] * np.float32(part.mass / total)
        weights, self._slots = self._optimizer.step(
            current.weights,
            self._slots,
            mean * np.float32(combination.scale),
            n_steps=current.number,
            statistics=layout.of_statistics(0, layout.n_parameters),
        )
        self.combined.append(combination)
        self.norms.update(norms)
        now_s = self._world.clock.now_s
        self.versions.append(
            PublishedVersion(current.number + 1, now_s, weights, self._adapt(current.grids, heads, mean))
        )
        self._publish(self.versions[-1])
        self.feed(Combined(combination_id=combination.combination_id, norms=norms, quarantined=quarantined))

    def _adapt(self, known: tuple[Grid, ...], heads: Sequence[Aggregate], mean: Weights) -> tuple[Grid, ...]:
        current = known[-1]
        if any(head.grid_id != current.grid_id for head in heads):
            return known  # clipping on an older grid says nothing about this one
        n_values = self._world.layout.n_parameters * sum(head.n_updates for head in heads)
        n_saturated = sum(head.saturated for head in heads)
        adapted = grids.adapt(current, self._world.layout, mean, n_saturated, n_values, self._decoder.qmax)
        return known if adapted is current else (*(grid for grid in known if grid.grid_id != adapted.grid_id), adapted)


def _seed(seed: int, identity: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{identity}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big")
