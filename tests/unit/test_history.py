import json

from fednats.messages import MAX_METRICS
from fednats.protocol.events import EvaluationsSummed
from fednats.services.coordinator.history import SHOWN_VERSIONS, History
from fednats.services.tier.tier import Handled
from fednats.testbed.summary import Statuses, with_newest
from tests.makers import announcement

N_VERSIONS = 30 * SHOWN_VERSIONS
METRICS = {f"recall_{number}": 0.123456789012345 for number in range(MAX_METRICS)}


def grown(n_versions: int) -> History:
    history = History()
    for version in range(n_versions):
        evaluated = EvaluationsSummed(version=version, n_sites=2, n_samples=100, metrics=METRICS)
        history.note(Handled(announcement(version), 0.0, float(version), [], None))
        history.note(Handled(evaluated, 0.0, version + 0.5, [], None))
    return history


def test_thousands_of_versions_with_all_metrics_are_still_one_message() -> None:
    history = grown(N_VERSIONS)
    shown = history.shown()
    assert len(json.dumps(shown)) < 2**20
    assert [entry["version"] for entry in shown] == list(range(N_VERSIONS - SHOWN_VERSIONS, N_VERSIONS))
    assert (shown[-1]["published_s"], shown[-1]["evaluated_s"]) == (N_VERSIONS - 1, N_VERSIONS - 0.5)
    assert history.newest_metrics == METRICS


def test_who_asks_now_and_then_has_all_of_it() -> None:
    statuses: Statuses = {"site-a": {"state": "waiting"}}
    for n_versions in range(1, 3 * SHOWN_VERSIONS, SHOWN_VERSIONS // 2):
        statuses = with_newest(statuses, {"coordinator": {"history": grown(n_versions).shown()}})
    statuses = with_newest(statuses, {"coordinator": {"role": "coordinator"}})  # it starts again
    versions = [entry["version"] for entry in statuses["coordinator"]["history"]]
    assert versions == list(range(n_versions))
    assert statuses["site-a"] == {"state": "waiting"}
