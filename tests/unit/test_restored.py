"""A machine whose journal is from a backup: what was in a sum since is in no other, and comes back as known."""

from fednats.config import AggregationSettings, RunSettings, StalenessSettings
from fednats.errors import Reason
from fednats.messages import Aggregate, EvaluationBlocks, Grid, Opening, OpeningNote, Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector, CollectorState
from fednats.protocol.compositions import combination_of, composition_of
from fednats.protocol.coordinator import Coordinator
from fednats.protocol.events import (
    Combination,
    Combine,
    Combined,
    Command,
    Configured,
    ContributionArrived,
    DeadlineReached,
    EvaluationArrived,
    Refuse,
    Restored,
    Settle,
    SumEvaluations,
)
from tests.makers import aggregate, announcement, evaluation, opened, update

THREE = ("a", "b", "c")
SETTINGS = AggregationSettings(goal=3, region_goal=2, min_sites=2, staleness=StalenessSettings(max_staleness=5))


def region() -> Collector:
    machine = Collector(
        Roster(run="r", region="north", sites=frozenset(THREE), regions=frozenset()), lambda event: event.settings.goal
    )
    machine.handle(announcement(settings=SETTINGS))
    return machine


def arrive(machine: Collector | Coordinator, *heads: Update | Aggregate) -> list[Command]:
    return [command for head in heads for command in machine.handle(ContributionArrived(head=head))]


def combined(commands: list[Command]) -> Combination:
    (made,) = [command.combination for command in commands if isinstance(command, Combine)]
    return made


def since_backup(machine: Collector, *heads: Update) -> Restored:
    """Let the true machine go on from the backup: return what the bus then tells the restored one."""
    made = combined(arrive(machine, *heads))
    return Restored(version=0, made=(composition_of("r", "north", made, "", 500),))


def test_a_note_tells_of_the_combination_as_it_was() -> None:
    made = combined(arrive(region(), *map(update, THREE)))
    told = combination_of(composition_of("r", "north", made, "", 500))
    assert (told.combination_id, told.version, told.scale, told.n_sites) == (
        made.combination_id,
        made.version,
        made.scale,
        made.n_sites,
    )
    assert [(part.mass, part.staleness) for part in told.parts] == [(part.mass, part.staleness) for part in made.parts]
    assert all(part.head.payload.digests == () for part in told.parts)


def test_updates_that_were_summed_since_the_backup_are_in_no_second_sum() -> None:
    """Without it, a sum of two of the three would go up beside that of all three: their difference is the third's update."""
    true, restored = region(), region()
    arrive(restored, update("a"), update("b"))  # waited when the backup was made
    restored.handle(since_backup(true, *map(update, THREE)))
    assert restored.n_buffered == 0
    assert restored.handle(DeadlineReached()) == []
    for head in map(update, THREE):  # not settled before the crash: delivered again
        assert arrive(restored, head) == [Settle((head.update_id,))]


def test_the_numbers_of_summed_updates_are_taken() -> None:
    true, restored = region(), region()
    restored.handle(since_backup(true, *map(update, THREE)))
    (command,) = arrive(restored, update("a").model_copy(update={"update_id": "replayed-under-another-id"}))
    assert isinstance(command, Refuse)
    assert command.reason is Reason.REPLAYED


def test_what_waited_and_was_not_summed_since_comes_again_and_counts() -> None:
    restored = region()
    arrive(restored, update("a"), update("b"))
    restored.handle(Restored(version=0, made=()))
    assert restored.n_buffered == 0
    made = combined(arrive(restored, *map(update, THREE)))
    assert len(made.parts) == 3


def test_a_sum_that_was_under_way_is_given_up() -> None:
    restored = region()
    combined(arrive(restored, *map(update, THREE)))
    restored.handle(Restored(version=0, made=()))
    assert restored.state is CollectorState.COLLECTING
    assert restored.outstanding() == []


def test_evaluations_of_versions_up_to_the_newest_are_summed_no_more() -> None:
    restored = region()
    restored.handle(EvaluationArrived(evaluation=evaluation("a")))
    restored.handle(Restored(version=0, made=()))
    for site in THREE:
        commands = restored.handle(EvaluationArrived(evaluation=evaluation(site)))
        assert [type(command) for command in commands] == [Settle]
    restored.handle(announcement(1, settings=SETTINGS))
    summed = [
        command for site in THREE for command in restored.handle(EvaluationArrived(evaluation=evaluation(site, 1)))
    ]
    assert any(isinstance(command, SumEvaluations) for command in summed)


def test_blocks_of_evaluations_go_on_as_they_were_noted() -> None:
    """Sums over others of the same sites than before the backup would tell the difference."""
    restored = region()
    noted = EvaluationBlocks(run="r", node="north", blocks=(("a", "b"), ("c",)), asked=(("a", 2), ("b", 2), ("c", 1)))
    restored.handle(Restored(version=0, made=(), blocks=noted))
    assert restored.evaluations.blocks == noted


def test_a_coordinator_applies_no_sum_again_and_remembers_the_norms() -> None:
    true, restored = hub(), hub()
    arrive(restored, aggregate("north"))
    made = combined(arrive(true, aggregate("north"), aggregate("south")))
    norms = {"north-1": 2.0, "south-1": 3.0}
    true.handle(Combined(combination_id=made.combination_id, norms=norms))
    note = composition_of("r", "hub", made, "", None, norms=norms, weights_digest=b"0" * 16)
    restored.handle(Restored(version=1, made=(note,)))
    restored.handle(announcement(1, settings=SETTINGS, capacity=None))
    assert restored.version == 1
    for region_name in ("north", "south"):
        assert arrive(restored, aggregate(region_name)) == [Settle((f"{region_name}-1",))]
    assert list(restored.norms._all) == list(true.norms._all)
    assert combined(arrive(restored, aggregate("north", 2), aggregate("south", 2)))


def test_a_run_that_was_closed_since_the_backup_stays_closed() -> None:
    restored = hub()
    restored.handle(Restored(version=5, made=(), closed="target reached"))
    assert (restored.state.name, restored.reason) == ("CLOSED", "target reached")


def test_a_run_that_was_opened_since_the_backup_is_the_one_that_goes_on() -> None:
    restored = hub()
    opening = Opening(name="second", first_version=4, opened_at=4)
    note = OpeningNote(
        run="r",
        opening=opening,
        settings=RunSettings(name="second"),
        grid=Grid(grid_id="g4", steps=()),
        weights_digest=bytes(16),
    )
    restored.handle(Restored(version=5, made=(), openings=(note,), unknown=(1, 2, 3)))
    assert (restored.state.name, restored.opening) == ("OPEN", opening)
    assert [(run.opening.name, run.last_version) for run in restored.past] == [("r", 3)]


def hub() -> Coordinator:
    machine = Coordinator("r")
    machine.handle(opened())
    machine.handle(Configured(sites=(), regions=("north", "south")))
    machine.handle(announcement(settings=SETTINGS, capacity=None))
    return machine
