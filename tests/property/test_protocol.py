"""Any order, any duplicates, who comes and goes, a crash between any two events: every update is in exactly one sum."""

from collections import Counter
from random import Random

import hypothesis.strategies as st
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fednats.config import AggregationSettings, StalenessSettings
from fednats.errors import Reason
from fednats.messages import Opening, Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector, CollectorState
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    CombineFailed,
    Command,
    ContributionArrived,
    DeadlineReached,
    Event,
    Part,
    PresenceChanged,
    Refuse,
    Settle,
    contribution_id,
)
from fednats.protocol.weights import apportion
from tests.makers import FIRST, announcement, closed, update

SITES = ("a", "b", "c", "d")
ROSTER = Roster(run="r", region="north", sites=frozenset(SITES), regions=frozenset())
SETTINGS = AggregationSettings(goal=3, deadline_s=1.0, staleness=StalenessSettings(max_staleness=4))


def sites_of(heads: list[Update]) -> int:
    return len({head.site for head in heads})


class Crashes(RuleBasedStateMachine):
    """An aggregator over a bus that delivers at least once, killed at any point and restarted from its journal."""

    def __init__(self) -> None:
        super().__init__()
        self.journal: list[Event] = []
        self.stream: dict[str, Update] = {}  # what the bus still holds: not acknowledged
        self.sent: Counter[str] = Counter()
        self.version = 0
        self.published: dict[str, Combination] = {}  # the bus drops a second message of the same id
        self.refused: dict[str, Reason] = {}
        self.damaged: set[str] = set()
        self.opening = FIRST
        self.closed = False
        self.first_of = {0: 0}  # version to the first one of its run
        self.left_over: set[str] = set()
        self.n_grids = 1
        self.grids = ["g0"]
        self.present = frozenset(SITES)
        self.start()
        self.feed(announcement(0, settings=SETTINGS))

    def start(self) -> None:
        self.machine = Collector(ROSTER, lambda event: event.settings.goal)
        for event in self.journal:
            self.machine.handle(event)
        self.commands: list[Command] = self.machine.outstanding()
        self.to_report: list[str] = []

    def feed(self, event: Event) -> None:
        self.journal.append(event)
        self.commands += self.machine.handle(event)

    @rule(
        site=st.sampled_from(SITES),
        age=st.integers(0, 6),
        ahead=st.booleans(),
        min_sites=st.sampled_from([1, 1, 1, 2, 3, 4]),
    )
    def send(self, site: str, age: int, ahead: bool, min_sites: int) -> None:  # noqa: FBT001
        """Train on some older version, encode on the newest grid the site knows: perhaps one not yet heard of here."""
        self.sent[site] += 1
        grid = f"g{self.n_grids}" if ahead else self.grids[-1]
        version = self.version + 1 if ahead and self.closed else max(0, self.version - age)
        sent = update(site, self.sent[site], version=version, grid=grid, min_sites=min_sites)
        self.stream[sent.update_id] = sent

    @precondition(lambda self: self.stream)
    @rule(data=st.data())
    def deliver(self, data: st.DataObject) -> None:
        identity = data.draw(st.sampled_from(sorted(self.stream)))
        self.feed(ContributionArrived(head=self.stream[identity]))

    @precondition(lambda self: not self.closed)
    @rule(new_grid=st.booleans())
    def announce(self, new_grid: bool) -> None:  # noqa: FBT001
        self.version += 1
        if new_grid or self.is_ahead():
            self.add_grid()
        self.tell_version()

    @precondition(lambda self: not self.closed)
    @rule(heard=st.booleans())
    def close(self, heard: bool) -> None:  # noqa: FBT001
        """End the run; a region whose link is cut hears of the next one only."""
        self.closed = True
        if heard:
            self.feed(closed(self.opening, self.version))

    @precondition(lambda self: self.closed)
    @rule(extends=st.booleans())
    def open(self, extends: bool) -> None:  # noqa: FBT001
        self.closed = False
        self.version += 1
        first = self.opening.first_version if extends else self.version
        self.opening = Opening(name="r", first_version=first, opened_at=self.version)
        if not extends:
            self.grids.clear()
        if not extends or self.is_ahead():
            self.add_grid()
        self.tell_version()

    @precondition(lambda self: self.opening != FIRST)
    @rule()
    def hear_an_old_end(self) -> None:
        self.feed(closed(FIRST, 0))

    def is_ahead(self) -> bool:
        """Whether a site is on a grid that it has seen at the coordinator, and that is announced here next."""
        return f"g{self.n_grids}" in {sent.grid_id for sent in self.stream.values()}

    def add_grid(self) -> None:
        self.grids.append(f"g{self.n_grids}")
        self.n_grids += 1

    def tell_version(self) -> None:
        self.first_of[self.version] = self.opening.first_version
        self.feed(announcement(self.version, settings=SETTINGS, grids=tuple(self.grids), opening=self.opening))

    @rule(present=st.frozensets(st.sampled_from(SITES)))
    def come_and_go(self, present: frozenset[str]) -> None:
        self.present = present
        self.feed(PresenceChanged(present=tuple(sorted(present))))

    @rule()
    def reach_deadline(self) -> None:
        self.feed(DeadlineReached())

    @precondition(lambda self: self.commands)
    @rule()
    def execute(self) -> None:
        command = self.commands.pop(0)
        match command:
            case Combine(combination):
                self.published.setdefault(combination.combination_id, combination)
                self.to_report.append(combination.combination_id)
            case Settle(ids):
                for identity in ids:
                    self.note_left_over(identity)
                    self.stream.pop(identity, None)
            case Refuse(identity, reason, _):
                self.refused[identity] = reason
                self.stream.pop(identity, None)
            case _:
                pass

    def note_left_over(self, identity: str) -> None:
        """What is settled and in no sum is of a run that is over."""
        if identity in self.stream and not self.counted()[identity]:
            assert self.closed or self.stream[identity].base_version < self.opening.opened_at
            self.left_over.add(identity)

    @precondition(lambda self: self.to_report)
    @rule()
    def report(self) -> None:
        self.feed(Combined(combination_id=self.to_report.pop(0)))

    @precondition(
        lambda self: (
            self.commands
            and isinstance(self.commands[0], Combine)
            and self.commands[0].combination.combination_id not in self.published
        )
    )
    @rule()
    def fail(self) -> None:
        command = self.commands.pop(0)
        assert isinstance(command, Combine)
        made = command.combination
        bad = contribution_id(made.parts[0].head)
        self.damaged.add(bad)
        self.feed(CombineFailed(combination_id=made.combination_id, refused={bad: (Reason.CIPHERTEXT, "damaged")}))

    @precondition(
        lambda self: (
            self.commands
            and isinstance(self.commands[0], Combine)
            and self.commands[0].combination.combination_id not in self.published
        )
    )
    @rule()
    def lose_the_store(self) -> None:
        """The chunks of a contribution are gone; what was not acknowledged is delivered again."""
        command = self.commands.pop(0)
        assert isinstance(command, Combine)
        made = command.combination
        gone = contribution_id(made.parts[0].head)
        self.feed(CombineFailed(combination_id=made.combination_id, refused={}, vanished=(gone,)))

    @rule()
    def crash(self) -> None:
        self.start()

    def counted(self) -> Counter[str]:
        return Counter(contribution_id(part.head) for made in self.published.values() for part in made.parts)

    @invariant()
    def nothing_counts_twice(self) -> None:
        assert max(self.counted().values(), default=0) <= 1
        assert not self.refused.keys() & self.counted().keys()
        assert not self.left_over & self.counted().keys()

    @invariant()
    def every_sum_has_enough_sites(self) -> None:
        for made in self.published.values():
            sites = {part.head.site for part in made.parts if isinstance(part.head, Update)}
            assert len(sites) >= max(SETTINGS.min_sites, *(part.head.min_sites for part in made.parts))

    @invariant()
    def no_run_takes_what_was_made_for_an_earlier_one(self) -> None:
        for made in self.published.values():
            first = self.first_of[made.version]
            assert all(part.head.base_version >= first for part in made.parts if isinstance(part.head, Update))

    @invariant()
    def nothing_is_lost(self) -> None:
        """What the bus no longer holds was counted, left over by the end of its run, or refused for a reason it really gave."""
        everything = {f"{site}-{n}" for site, count in self.sent.items() for n in range(1, count + 1)}
        assert everything <= self.stream.keys() | self.counted().keys() | self.refused.keys() | self.left_over
        for identity, reason in self.refused.items():
            if reason is Reason.CIPHERTEXT:
                assert identity in self.damaged
            elif reason is Reason.EARLIER_RUN:
                assert self.opening.first_version > 0
            else:
                assert reason is Reason.TOO_STALE
                assert self.version > SETTINGS.staleness.max_staleness

    @invariant()
    def what_is_ready_is_summed(self) -> None:
        """With the goal, or everybody who is there, on one grid and nothing under way, a sum has been asked for."""
        if self.machine.state is CollectorState.COLLECTING:
            buffered = [head for head in self.machine.buffered() if isinstance(head, Update)]
            for grid in {head.grid_id for head in buffered}:
                content = group = [head for head in buffered if head.grid_id == grid]
                for n_sites in (4, 3, 2, 1):  # who asks for more sites than there are is not in a sum
                    if sites_of(content) < n_sites:
                        content = [head for head in content if head.min_sites < n_sites]
                waiting = {head.site for head in group} - {head.site for head in content}
                assert len(content) < min(3, len(self.present - waiting)) or sites_of(content) < SETTINGS.min_sites

    @invariant()
    def who_is_there_is_known(self) -> None:
        assert self.machine.present == self.present
        assert self.machine.short_of_sites == (len(self.present) < SETTINGS.min_sites)

    def teardown(self) -> None:
        """Whatever happened: those who are there go on, if they are enough."""
        if self.closed:
            self.open(extends=False)
        self.finish_all()
        n_published = len(self.published)
        for site in sorted(self.present):
            self.sent[site] += 1
            self.feed(
                ContributionArrived(head=update(site, self.sent[site], version=self.version, grid=self.grids[-1]))
            )
        self.finish_all()
        if len(self.present) >= SETTINGS.min_sites:
            assert len(self.published) > n_published
        self.nothing_counts_twice()
        self.every_sum_has_enough_sites()

    def finish_all(self) -> None:
        while self.commands or self.to_report:
            if self.to_report:
                self.report()
            else:
                self.execute()


TestCrashes = Crashes.TestCase
TestCrashes.settings = settings(max_examples=120, stateful_step_count=60, deadline=None, derandomize=True)


def combine_all(updates: list[Update]) -> tuple[Part, ...]:
    registered = {head.site: head.n_samples for head in updates}
    machine = Collector(Roster("r", "north", set(registered), frozenset(), registered), lambda _: "all")
    machine.handle(announcement(0, settings=AggregationSettings()))
    commands = [command for head in updates for command in machine.handle(ContributionArrived(head=head))]
    (combine,) = (command for command in commands if isinstance(command, Combine))
    return combine.combination.parts


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=2, max_size=4), st.randoms())
def test_order_and_duplicates_do_not_matter(n_samples: list[int], random: Random) -> None:
    updates = [update(site, n_samples=n) for site, n in zip(SITES, n_samples, strict=False)]
    shuffled = [*updates, *updates]
    random.shuffle(shuffled)
    assert combine_all(shuffled) == combine_all(updates)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.integers(1, 5000), min_size=2, max_size=4), st.integers(100, 600))
def test_fresh_updates_weigh_as_in_fedavg(n_samples: list[int], total: int) -> None:
    """McMahan et al. 2017: each share is n_k / n, here to within one unit of the total weight."""
    updates = [update(site, n_samples=n) for site, n in zip(SITES, n_samples, strict=False)]
    parts = combine_all(updates)
    weights = apportion([part.mass for part in parts], [1] * len(parts), total)
    smallest = min(n_samples) / sum(n_samples) * total
    for part, weight in zip(parts, weights, strict=True):
        share = part.head.n_samples / sum(n_samples)
        if smallest >= 1:
            assert abs(weight / sum(weights) - share) < 1 / total
        assert part.mass == part.head.n_samples
