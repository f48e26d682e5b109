from fednats.config import AggregationSettings
from fednats.errors import Reason
from fednats.protocol.coordinator import Coordinator, RunState
from fednats.protocol.events import (
    AwaitFinalEvaluation,
    CloseRun,
    Combine,
    Combined,
    CombineFailed,
    Command,
    Configured,
    ContributionArrived,
    EvaluationArrived,
    EvaluationsSummed,
    EverySiteFails,
    FinalEvaluationOverdue,
    KeepBest,
    Refuse,
    RunFailed,
    Settle,
    SumEvaluations,
    VersionAnnounced,
    WallTimeReached,
)
from tests.makers import FIRST, aggregate, announcement, evaluation_sum, opened

REGIONS = frozenset({"fjord", "delta"})


def coordinator(**stop: object) -> Coordinator:
    machine = Coordinator("r")
    machine.handle(Configured(sites=(), regions=tuple(sorted(REGIONS))))
    machine.handle(opened(FIRST, **{"max_versions": 10, **stop}))
    machine.handle(version(0))
    return machine


def version(number: int) -> VersionAnnounced:
    return announcement(number, settings=AggregationSettings(region_goal=1), capacity=None)


def evaluate(machine: Coordinator, number: int, auc: float, regions: frozenset[str] = REGIONS) -> list[Command]:
    """Have the regions report, and the sum read as this AUC where one is asked for."""
    commands = []
    for region in sorted(regions):
        commands += machine.handle(EvaluationArrived(evaluation=evaluation_sum(region, number)))
    for command in list(commands):
        if isinstance(command, SumEvaluations):
            n_sites = sum(2 for _ in command.parts)
            done = EvaluationsSummed(version=command.version, n_sites=n_sites, n_samples=10, metrics={"auc": auc})
            commands += machine.handle(done)
    return commands


def apply(machine: Coordinator, region: str, number: int) -> list[Command]:
    (combine,) = machine.handle(ContributionArrived(head=aggregate(region, number, version=machine.version)))
    assert isinstance(combine, Combine)
    commands = machine.handle(version(machine.version + 1))
    return commands + machine.handle(Combined(combination_id=combine.combination.combination_id))


def test_every_aggregate_makes_a_version_when_the_goal_is_one() -> None:
    machine = coordinator()
    assert apply(machine, "fjord", 1) == [Settle(("fjord-1",))]
    assert apply(machine, "delta", 1) == [Settle(("delta-1",))]
    assert machine.version == 2


def test_the_best_version_is_kept_and_the_target_noted() -> None:
    machine = coordinator(target=0.8)
    machine.handle(version(2))
    assert KeepBest(0) in evaluate(machine, 0, 0.6)
    assert KeepBest(1) in evaluate(machine, 1, 0.85)
    assert not [c for c in evaluate(machine, 2, 0.7) if isinstance(c, KeepBest)]
    assert machine.best is not None
    assert machine.best.version == 1
    assert machine.reached_target_at == 1
    assert machine.state is RunState.OPEN


def test_a_figure_over_few_sites_is_neither_best_nor_target() -> None:
    machine = coordinator(target=0.9)
    evaluate(machine, 0, 0.6)
    machine.handle(version(8))
    commands = [c for v in range(1, 8) for c in evaluate(machine, v, 0.95, frozenset({"fjord"}))]
    assert not [command for command in commands if isinstance(command, KeepBest)]
    assert machine.reached_target_at is None


def summed(machine: Coordinator, number: int, auc: float, n_sites: int, n_samples: int) -> list[Command]:
    """Have what was evaluated of a version read as this AUC over so many hospitals and cases."""
    for region in REGIONS:
        machine.handle(EvaluationArrived(evaluation=evaluation_sum(region, number)))
    done = EvaluationsSummed(version=number, n_sites=n_sites, n_samples=n_samples, metrics={"auc": auc})
    return [command for command in machine.handle(done) if isinstance(command, KeepBest)]


def test_figures_of_fewer_hospitals_are_not_compared_with_those_of_all() -> None:
    """Two of five have the easy cases: the untrained version is not the best for that."""
    machine = coordinator(target=0.99)
    machine.handle(version(9))
    assert summed(machine, 0, 0.98, n_sites=2, n_samples=44)
    assert summed(machine, 1, 0.70, n_sites=5, n_samples=150) == [KeepBest(1)]
    assert not summed(machine, 2, 0.995, n_sites=2, n_samples=62)
    assert summed(machine, 3, 0.80, n_sites=5, n_samples=152) == [KeepBest(3)]
    assert machine.reached_target_at is None


def test_figures_of_another_number_of_cases_are_not_compared() -> None:
    machine = coordinator(target=0.99)
    machine.handle(version(30))
    for number in range(3):
        summed(machine, number, 0.9, n_sites=5, n_samples=150)
    assert not summed(machine, 3, 0.9997, n_sites=5, n_samples=33552)
    assert machine.reached_target_at is None
    kept = [summed(machine, number, 0.85, n_sites=5, n_samples=300) for number in range(4, 12)]
    assert kept == [[], [], [KeepBest(6)], [], [], [], [], []], "it begins anew once that number is usual"


def test_the_run_ends_after_its_last_version_is_evaluated() -> None:
    machine = coordinator(max_versions=1)
    assert AwaitFinalEvaluation(30.0) in apply(machine, "fjord", 1)
    assert machine.state is RunState.FINISHING
    assert machine.handle(ContributionArrived(head=aggregate("delta"))) == [Settle(("delta-1",))]
    assert evaluate(machine, 1, 0.7)[-1] == CloseRun(FIRST, 1, "max_versions reached")


def test_the_run_ends_without_the_last_evaluations_if_they_do_not_come() -> None:
    machine = coordinator(max_versions=1)
    apply(machine, "fjord", 1)
    assert machine.handle(FinalEvaluationOverdue()) == [CloseRun(FIRST, 1, "max_versions reached")]
    assert machine.handle(FinalEvaluationOverdue()) == []


def test_the_run_stops_at_the_target_if_told_to() -> None:
    machine = coordinator(target=0.8, stop_at_target=True)
    assert evaluate(machine, 0, 0.9)[-1] == CloseRun(FIRST, 0, "target reached")


def read(machine: Coordinator, number: int, undefined: tuple[str, ...] = (), **metrics: float) -> list[Command]:
    """Have the evaluations of a version read as these figures."""
    return machine.handle(
        EvaluationsSummed(version=number, n_sites=4, n_samples=9, metrics=metrics, undefined=undefined)
    )


def summing(machine: Coordinator, *numbers: int) -> Coordinator:
    machine.handle(version(max(numbers)))
    for number in numbers:
        for region in sorted(REGIONS):
            machine.handle(EvaluationArrived(evaluation=evaluation_sum(region, number)))
    return machine


def test_a_target_metric_that_no_evaluation_has_closes_the_run_and_names_those_that_are_there() -> None:
    machine = summing(coordinator(target_metric="c-index"), 0)
    closed = read(machine, 0, undefined=("c_index",), rmse=3.0)[-1]
    assert isinstance(closed, CloseRun)
    assert closed.reason.endswith("'c-index', and no evaluation has it; set it to one of: rmse, c_index")
    assert machine.failed


def test_a_target_metric_that_is_only_undefined_yet_is_waited_for() -> None:
    machine = summing(coordinator(target_metric="c_index"), 0, 1)
    assert not [c for c in read(machine, 0, undefined=("c_index",)) if isinstance(c, CloseRun)]
    assert KeepBest(1) in read(machine, 1, c_index=0.6)


def test_less_of_an_error_is_better() -> None:
    machine = summing(coordinator(target_metric="rmse", target=2.0), 0, 1, 2)
    assert KeepBest(0) in read(machine, 0, rmse=3.0)
    assert not [c for c in read(machine, 1, rmse=4.0) if isinstance(c, KeepBest)]
    assert machine.reached_target_at is None
    assert KeepBest(2) in read(machine, 2, rmse=2.0)
    assert machine.reached_target_at == 2


def test_the_settings_may_say_that_less_is_better() -> None:
    machine = summing(coordinator(target_metric="gap", lower_is_better=True), 0, 1)
    read(machine, 0, gap=3.0)
    assert KeepBest(1) in read(machine, 1, gap=1.0)


def test_without_a_target_metric_it_is_auc_or_the_task_s_first() -> None:
    usual, own = summing(coordinator(), 0), summing(coordinator(), 0)
    read(usual, 0, accuracy=0.5, auc=0.6)
    read(own, 0, rmse=3.0, mae=2.0)
    assert (usual.target_metric, own.target_metric) == ("auc", "rmse")


def test_the_clock_ends_the_run() -> None:
    machine = coordinator()
    assert AwaitFinalEvaluation(30.0) in machine.handle(WallTimeReached())
    assert machine.reason == "max_wall_s reached"


def test_a_run_whose_sites_all_fail_ends_at_once_with_what_they_say() -> None:
    machine = coordinator()
    assert machine.handle(EverySiteFails(why="training failed: ValueError")) == [
        CloseRun(FIRST, 0, "every site fails: training failed: ValueError")
    ]
    assert machine.failed
    assert machine.handle(EverySiteFails(why="again")) == []
    assert machine.outstanding() == [CloseRun(FIRST, 0, "every site fails: training failed: ValueError")]


def test_sums_that_are_buffered_when_the_run_is_given_up_are_settled() -> None:
    machine = Coordinator("r")
    machine.handle(Configured(sites=(), regions=tuple(sorted(REGIONS))))
    machine.handle(opened(FIRST))
    machine.handle(announcement(0, settings=AggregationSettings(region_goal=2), capacity=None))
    machine.handle(ContributionArrived(head=aggregate("fjord", 1, version=0)))
    assert machine.handle(EverySiteFails(why="x")) == [Settle(("fjord-1",)), CloseRun(FIRST, 0, "every site fails: x")]


def test_an_evaluation_of_a_version_that_is_not_there_closes_nothing() -> None:
    machine = coordinator()
    assert not [c for c in evaluate(machine, 2**40, 0.9) if isinstance(c, KeepBest)]
    assert KeepBest(0) in evaluate(machine, 0, 0.6)


def test_a_restart_finishes_what_was_closing() -> None:
    machine = coordinator(max_versions=1)
    apply(machine, "fjord", 1)
    assert machine.outstanding() == [AwaitFinalEvaluation(30.0)]
    machine.handle(FinalEvaluationOverdue())
    assert machine.outstanding() == [CloseRun(FIRST, 1, "max_versions reached")]


def test_evaluations_that_could_not_be_read_are_no_figure() -> None:
    machine = coordinator(target=0.8)
    for region in sorted(REGIONS):
        machine.handle(EvaluationArrived(evaluation=evaluation_sum(region, 0)))
    (settled,) = machine.handle(EvaluationsSummed(version=0, n_sites=0, n_samples=0))
    assert settled == Settle(("evaluation.delta.0", "evaluation.fjord.0"))
    assert machine.evaluated == {}


def test_a_run_whose_next_version_is_impossible_ends_and_says_why() -> None:
    machine = coordinator()
    evaluate(machine, 0, 0.6)
    (combine,) = machine.handle(ContributionArrived(head=aggregate("fjord", 1, version=0)))
    assert isinstance(combine, Combine)
    machine.handle(RunFailed(reason="version 1 would not be a model: weight is not finite"))
    assert machine.failed
    failed = CombineFailed(combination_id=combine.combination.combination_id, refused={})
    close = CloseRun(FIRST, 0, "version 1 would not be a model: weight is not finite")
    assert machine.handle(failed) == [Settle(("fjord-1",)), close]
    assert machine.outstanding()[-1] == close
    assert machine.in_flight is None


def in_flight(machine: Coordinator) -> str:
    (combine,) = machine.handle(
        ContributionArrived(head=aggregate("fjord", machine.version + 1, version=machine.version))
    )
    assert isinstance(combine, Combine)
    return combine.combination.combination_id


def closes(commands: list[Command]) -> list[int]:
    return [command.version for command in commands if isinstance(command, CloseRun)]


def test_a_run_that_ends_while_a_version_is_in_flight_ends_with_that_version_evaluated() -> None:
    machine = coordinator()
    evaluate(machine, 0, 0.6)
    identity = in_flight(machine)
    assert closes(machine.handle(WallTimeReached())) == []
    machine.handle(version(1))
    assert closes(machine.handle(Combined(combination_id=identity))) == []
    assert machine.state is RunState.FINISHING
    assert closes(evaluate(machine, 1, 0.7)) == [1]


def test_evaluations_that_came_before_the_last_version_was_announced_here_end_the_run() -> None:
    machine = coordinator()
    evaluate(machine, 0, 0.6)
    identity = in_flight(machine)
    machine.handle(WallTimeReached())
    early = [each for each in evaluate(machine, 1, 0.7) if isinstance(each, SumEvaluations)]
    told = machine.handle(version(1))
    machine.handle(Combined(combination_id=identity))
    assert early or any(isinstance(command, SumEvaluations) for command in told)


def test_a_run_ends_without_a_version_that_came_to_nothing() -> None:
    machine = coordinator()
    evaluate(machine, 0, 0.6)
    identity = in_flight(machine)
    machine.handle(WallTimeReached())
    assert closes(machine.handle(CombineFailed(combination_id=identity, refused={}))) == [0]


def test_the_final_evaluation_is_waited_for_from_when_its_version_is_there() -> None:
    machine = coordinator()
    evaluate(machine, 0, 0.6)
    identity = in_flight(machine)
    machine.handle(WallTimeReached())
    assert closes(machine.handle(FinalEvaluationOverdue())) == []
    machine.handle(version(1))
    commands = machine.handle(Combined(combination_id=identity))
    assert [type(command) for command in commands if not isinstance(command, Settle)] == [AwaitFinalEvaluation]
    assert closes(machine.handle(FinalEvaluationOverdue())) == [1]


def test_a_run_in_which_every_site_fails_ends_as_soon_as_nothing_is_in_flight() -> None:
    machine = coordinator()
    identity = in_flight(machine)
    assert closes(machine.handle(EverySiteFails(why="task: KeyError"))) == []
    machine.handle(version(1))
    assert closes(machine.handle(Combined(combination_id=identity))) == [1]


def test_what_spoils_the_last_combination_of_a_closed_run_is_refused_by_its_reason() -> None:
    machine = coordinator()
    identity = in_flight(machine)
    machine.handle(WallTimeReached())
    refused = {"fjord-1": (Reason.CHECKSUM, "chunk 0 is damaged")}
    (refusal,) = [
        command
        for command in machine.handle(CombineFailed(combination_id=identity, refused=refused))
        if isinstance(command, Refuse | Settle)
    ]
    assert refusal == Refuse("fjord-1", Reason.CHECKSUM, "chunk 0 is damaged")
    assert machine.known(ContributionArrived(head=aggregate("fjord", 1))) == [refusal], "delivered again"
