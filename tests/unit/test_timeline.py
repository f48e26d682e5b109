"""What each site had done by when, from what all daemons say."""

from typing import Any

from fednats.testbed.timeline import MAX_POINTS, Timeline


def site(version: int, updates: int) -> dict[str, Any]:
    return {
        "role": "site",
        "name": "a",
        "state": "training",
        "version": version,
        "updates": updates,
        "sent_bytes": 100 * updates,
        "received_bytes": 7,
    }


def test_staleness_is_against_the_newest_version_then() -> None:
    timeline = Timeline()
    timeline.note({"site-a": {"role": "site", "name": "a", "doing": "loading"}}, 0.5)
    for at, (newest, version) in enumerate([(0, -1), (3, 3), (7, 3)], start=1):
        timeline.note({"coordinator": {"version": newest}, "site-a": site(version, at)}, float(at))
    seen = timeline.shown()["a"]
    assert [(each.at_s, each.updates, each.staleness) for each in seen] == [(1.0, 1, None), (2.0, 2, 0), (3.0, 3, 4)]
    assert seen[-1].sent_bytes == 300


def test_a_long_run_is_thinned_out_and_keeps_its_ends() -> None:
    timeline = Timeline()
    for at in range(1000):
        timeline.note({"coordinator": {"version": at}, "site-a": site(at, at)}, float(at))
    seen = timeline.shown()["a"]
    assert MAX_POINTS / 2 <= len(seen) <= MAX_POINTS
    assert (seen[0].at_s, seen[-1].at_s) == (0.0, 999.0)
    assert [each.at_s for each in seen] == sorted(each.at_s for each in seen)
