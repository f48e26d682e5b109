from fednats.protocol.site import (
    BudgetSpent,
    BusAway,
    BusBack,
    Closed,
    Declined,
    Done,
    Evaluate,
    Failed,
    HoursBegun,
    ModelSeen,
    NotStored,
    OutsideHours,
    Retry,
    Site,
    SiteState,
    Store,
    Train,
)


def test_a_new_model_is_evaluated_then_trained_on() -> None:
    site = Site()
    assert site.handle(ModelSeen(0)) == Evaluate(0)
    assert site.handle(Done()) == Train(0)
    assert site.handle(Done()) is None


def test_every_version_is_evaluated_but_only_the_newest_trained_on() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    site.handle(Done())
    for version in (1, 2, 3):
        assert site.handle(ModelSeen(version)) is None
    jobs = [site.handle(Done()) for _ in range(4)]
    assert jobs == [Evaluate(1), Evaluate(2), Evaluate(3), Train(3)]


def test_a_version_is_trained_on_once_also_over_a_restart() -> None:
    site = Site(last_trained=4)
    assert site.handle(ModelSeen(4)) == Evaluate(4)
    assert site.handle(Done()) is None
    assert site.handle(ModelSeen(4)) is None
    assert site.handle(ModelSeen(5)) == Evaluate(5)
    assert site.handle(Done()) == Train(5)


def test_an_old_version_that_comes_late_changes_nothing() -> None:
    site = Site()
    site.handle(ModelSeen(3))
    assert site.handle(ModelSeen(2)) is None
    assert site.handle(Done()) == Train(3)


def test_a_failed_pass_is_tried_again_after_a_pause_or_on_a_newer_version() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    assert site.handle(Done()) == Train(0)
    assert site.handle(Failed()) is None
    assert site.handle(Retry()) == Train(0)
    assert site.handle(Retry()) is None
    site.handle(Failed())
    assert site.handle(ModelSeen(1)) == Evaluate(1)
    assert site.handle(Done()) == Train(1)


def test_training_that_fails_repeatedly_waits_for_its_pause_whatever_versions_come() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    site.handle(Done())
    assert site.handle(Failed(repeats=True)) is None
    assert site.handle(ModelSeen(1)) == Evaluate(1)
    assert site.handle(Done()) is None
    assert site.handle(ModelSeen(2)) == Evaluate(2)
    assert site.handle(Retry()) is None
    assert site.handle(Done()) == Train(2)


def test_a_pass_that_could_not_be_stored_is_stored_before_anything_else_and_not_made_again() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    assert site.handle(Done()) == Train(0)
    assert site.handle(NotStored()) is None
    assert site.handle(Retry()) == Store(0)
    assert site.handle(NotStored()) is None
    assert site.handle(ModelSeen(1)) == Store(0)
    assert site.handle(Done()) == Evaluate(1)
    assert site.handle(Done()) == Train(1)


def test_a_kept_pass_that_is_lost_is_made_again() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    site.handle(Done())
    site.handle(NotStored())
    assert site.handle(Retry()) == Store(0)
    assert site.handle(Failed()) is None
    assert site.handle(Retry()) == Train(0)


def test_an_evaluation_that_fails_keeps_nobody_from_training() -> None:
    site = Site()
    assert site.handle(ModelSeen(0)) == Evaluate(0)
    assert site.handle(Failed()) == Train(0)
    assert site.handle(Done()) is None  # and it is not repeated
    site.handle(ModelSeen(1))
    assert site.handle(Failed()) == Train(1)


def test_a_slow_site_skips_evaluations_it_cannot_keep_up_with() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    for version in range(1, 10):
        site.handle(ModelSeen(version))
    jobs = [site.handle(Done()) for _ in range(5)]
    assert jobs == [*(Evaluate(version) for version in (6, 7, 8, 9)), Train(9)]


def test_a_closed_site_trains_no_more() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    assert site.handle(Closed()) is None
    assert site.handle(Done()) is None
    assert site.handle(Retry()) is None
    assert site.handle(ModelSeen(0)) is None


def test_the_last_version_of_a_closed_run_is_evaluated_whichever_is_heard_of_first() -> None:
    site = Site()
    assert site.handle(Closed()) is None
    assert site.handle(ModelSeen(7)) == Evaluate(7)
    assert site.handle(ModelSeen(7)) is None
    assert site.handle(Done()) is None
    busy = Site()
    busy.handle(ModelSeen(6))
    assert busy.handle(Done()) == Train(6)
    busy.handle(Closed())
    assert busy.handle(ModelSeen(7)) is None
    assert busy.handle(Done()) == Evaluate(7)
    assert busy.handle(Done()) is None
    assert busy.state is SiteState.CLOSED


def test_of_the_versions_that_wait_at_the_end_the_last_is_evaluated() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    for version in (1, 2, 3):
        site.handle(ModelSeen(version))
    site.handle(Closed())
    assert site.handle(Done()) == Evaluate(3)
    assert site.handle(Failed()) is None


def test_a_version_that_is_declined_is_not_evaluated_at_the_end_either() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    site.handle(ModelSeen(1))
    site.handle(Closed())
    site.handle(Declined())
    assert site.handle(Done()) is None


def test_a_site_whose_budget_is_spent_goes_on_evaluating_and_never_trains_again() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    assert site.handle(Done()) == Train(0)
    assert site.handle(ModelSeen(1)) is None
    assert site.handle(BudgetSpent()) == Evaluate(1)
    assert site.handle(Done()) is None
    assert not site.trains
    for version in (2, 3):
        assert site.handle(ModelSeen(version)) == Evaluate(version)
        assert site.handle(Failed()) is None
        assert site.handle(Retry()) is None
    assert site.handle(BusAway()) is None  # what it would train on by itself is spent as well
    assert site.handle(BusBack()) is None
    assert site.state is SiteState.IDLE


def test_a_budget_that_is_spent_while_the_bus_is_away_ends_training_on() -> None:
    site = Site(last_trained=0)
    site.handle(ModelSeen(0))
    site.handle(BusAway())
    assert site.handle(Done()) == Train(0, goes_on=True)
    assert site.handle(BudgetSpent()) is None


def test_with_a_larger_budget_a_restart_trains_again() -> None:
    site = Site(last_trained=3)
    site.handle(ModelSeen(4))
    assert site.handle(Done()) == Train(4)


def test_a_closed_site_takes_a_spent_budget_as_anything_else() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    site.handle(Done())
    site.handle(Closed())
    assert site.handle(BudgetSpent()) is None
    assert site.state is SiteState.CLOSED


def test_outside_its_hours_a_site_goes_on_evaluating_and_trains_on_the_newest_when_they_begin() -> None:
    site = Site(last_trained=3)
    site.handle(ModelSeen(4))
    assert site.handle(Done()) == Train(4)
    assert site.handle(ModelSeen(5)) is None
    assert site.handle(OutsideHours()) == Evaluate(5)
    assert not site.within_hours
    assert site.handle(Done()) is None
    assert site.handle(ModelSeen(6)) == Evaluate(6)
    assert site.handle(Done()) is None
    assert site.handle(BusAway()) is None
    assert site.handle(BusBack()) is None
    assert site.handle(HoursBegun()) == Train(6)
    assert site.within_hours


def test_hours_that_begin_during_an_evaluation_let_it_train_afterwards() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    assert site.handle(Done()) == Train(0)
    site.handle(OutsideHours())
    assert site.handle(ModelSeen(1)) == Evaluate(1)
    assert site.handle(HoursBegun()) is None
    assert site.handle(Done()) == Train(1)


def test_a_site_that_declines_trains_on_nothing_whatever_happens() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    assert site.handle(Done()) == Train(0)
    assert site.handle(Failed()) is None
    assert site.handle(Declined()) is None
    for event in (Retry(), BusAway(), BusBack(), HoursBegun()):
        assert site.handle(event) is None, event
    assert site.handle(ModelSeen(2)) == Evaluate(2)
    assert site.handle(Done()) == Train(2)


def test_a_site_that_declines_during_a_job_does_no_other_until_a_version_allows_it() -> None:
    site = Site()
    site.handle(ModelSeen(0))
    site.handle(ModelSeen(1))
    assert site.handle(Declined()) is None
    assert site.handle(Done()) is None
    assert site.handle(ModelSeen(2)) == Evaluate(2)
