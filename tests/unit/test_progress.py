import io
import re
from typing import Any

import pytest
from rich.console import Console

from fednats.config import StopSettings
from fednats.testbed.progress import Progress, sparkline

DAEMONS = ["coordinator", "aggregator-north", "aggregator-south", "site-a", "site-b", "site-c"]
STOP = StopSettings.model_validate({"target": 0.85, "max_versions": 20})


CONTROL = re.compile(r"\x1b\[[?\d;]*[A-Za-z]")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class AsciiTerminal(Terminal):
    encoding = "ascii"


def evaluated(version: int, auc: float) -> dict[str, Any]:
    return {
        "version": version,
        "published_s": 1.0 * version,
        "evaluated_s": 1.5 * version,
        "n_sites": 2,
        "n_samples": 100,
        "metrics": {"auc": auc},
    }


def coordinator(*history: dict[str, Any], version: int) -> dict[str, Any]:
    return {
        "role": "coordinator",
        "name": "coordinator",
        "run": "demo",
        "ready": True,
        "state": "open",
        "reason": "",
        "version": version,
        "n_parameters": 1000,
        "accepted": 3,
        "refused": 1,
        "refusals": {"checksum": 1},
        "best": None,
        "target_metric": "auc",
        "reached_target_at": None,
        "history": list(history),
        "n_updates": 7,
        "staleness_sum": 2,
        "staleness_max": 1,
        "sent_bytes": 0,
        "received_bytes": 0,
    }


def aggregator() -> dict[str, Any]:
    return {
        "role": "aggregator",
        "name": "north",
        "run": "demo",
        "ready": True,
        "region": "north",
        "state": "collecting",
        "version": 5,
        "buffered": 1,
        "accepted": 8,
        "refused": 2,
        "refusals": {"too_stale": 2},
        "sent_bytes": 3_400_000,
    }


def site(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "role": "site",
        "name": name,
        "run": "demo",
        "ready": True,
        "region": "north",
        "state": "training",
        "version": 3,
        "updates": 4,
        "refused": 0,
        "sent_bytes": 1_200_000,
        "received_bytes": 2_300_000,
        "train_s": 3.0,
        "metrics": {"auc": 0.8123},
        **changes,
    }


def statuses() -> dict[str, dict[str, Any]]:
    return {
        "coordinator": coordinator(evaluated(3, 0.7), evaluated(4, 0.9), version=5),
        "aggregator-north": aggregator(),
        "site-a": site("a-clinic"),
        "site-b": site("b-clinic", state="waiting", version=-1, updates=0, sent_bytes=0, metrics={}),
        "site-c": {"role": "site", "name": "c-clinic", "run": "demo", "ready": False, "doing": "loading"},
    }


def shown(width: int, stream: io.StringIO | None = None) -> list[str]:
    stream = stream or Terminal()
    console = Console(file=stream, width=width, height=60, force_terminal=True, color_system=None)
    with Progress("demo", "heart", STOP, DAEMONS, console) as progress:
        progress.update(statuses(), 83.2)
    return [line.rstrip() for line in CONTROL.sub("", stream.getvalue()).replace("\r", "\n").splitlines()]


def row(lines: list[str], first: str) -> list[str]:
    return next(line.split() for line in lines if line.startswith(first))


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_each_site_with_its_staleness_and_traffic(width: int) -> None:
    lines = shown(width)
    assert row(lines, "a-clinic") == ["a-clinic", "training", "3", "2", "4", "1.2", "MB", "2.3", "MB", "0.812"]
    assert row(lines, "b-clinic") == ["b-clinic", "waiting", "-", "-", "0", "-", "2.3", "MB", "-"]
    assert "north  collecting  1 buffered, 8 accepted, 2 refused, 3.4 MB up" in lines
    assert max(map(len, lines)) <= width


def test_a_terminal_shows_where_the_run_stands() -> None:
    lines = shown(80)
    assert any("demo  heart" in line and line.endswith("0:01:23") for line in lines)
    assert row(lines, "version") == ["version", "5", "of", "20,", "open"]
    assert row(lines, "auc") == ["auc", "0.900", "▁█", "target", "0.850"]
    assert " ".join(row(lines, "updates")) == "updates 7 in the model, 3 refused"
    assert " ".join(row(lines, "bytes")) == "bytes 1.2 MB from the sites, 4.6 MB to them, 3.4 MB from the regions"
    starting = dict.fromkeys(line for line in lines if line.startswith("starting"))
    assert list(starting) == ["starting  site-c: loading", "starting  aggregator-south: starting its process"]


def test_a_terminal_without_unicode_gets_plain_characters() -> None:
    lines = shown(80, AsciiTerminal())
    assert row(lines, "auc") == ["auc", "0.900", "_#", "target", "0.850"]
    assert "".join(lines).isascii()


def plain() -> tuple[Progress, io.StringIO]:
    stream = io.StringIO()
    return Progress("demo", "path/to/own.py:Own", STOP, DAEMONS, Console(file=stream, width=80)), stream


def test_a_pipe_gets_one_line_per_evaluated_version() -> None:
    progress, stream = plain()
    with progress:
        progress.update({}, 0.5)
        progress.update({"coordinator": {"role": "coordinator", "name": "coordinator", "ready": False}}, 1.0)
        progress.update({**statuses(), "coordinator": coordinator(evaluated(0, 0.5), version=1)}, 2.0)
        progress.update({**statuses(), "coordinator": coordinator(evaluated(0, 0.5), version=1)}, 2.5)
        progress.update({**statuses(), "coordinator": coordinator(evaluated(0, 0.5), evaluated(1, 0.75), version=2)}, 3)
    assert stream.getvalue().splitlines() == [
        "version 0: auc 0.5000 (2 sites, 100 cases), 2.0 s, 7 updates accepted, 3 refused",
        "version 1: auc 0.7500 (2 sites, 100 cases), 3.0 s, 7 updates accepted, 3 refused",
    ]


def test_a_coordinator_that_came_back_without_its_history_repeats_no_line() -> None:
    progress, stream = plain()
    with progress:
        for history in ([evaluated(0, 0.5)], [], [evaluated(1, 0.75)], [evaluated(1, 0.75)]):
            progress.update({"coordinator": coordinator(*history, version=2)}, 1.0)
    assert [line.split(":")[0] for line in stream.getvalue().splitlines()] == ["version 0", "version 1"]


def test_colour_that_is_forced_on_a_pipe_makes_no_terminal_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    progress, stream = plain()
    with progress:
        progress.update(statuses(), 1.0)
    assert len(stream.getvalue().splitlines()) == 2


def test_a_sparkline_thins_out_what_does_not_fit_and_ends_with_the_newest() -> None:
    line = sparkline([*[0.0] * 99, 1.0], 0.0, 1.0)
    assert len(line) == 32
    assert line[-1] == "█"
    assert set(line[:-1]) == {"▁"}
    assert sparkline([0.5, 0.5], 0.5, 0.5) == "▄▄"
