import io
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from fednats.testbed.comparison import Comparison, Worth
from fednats.testbed.summary import RunFigures, Summary, cells_of, compared, comparison, spent, summarise


def figures(**changes: Any) -> dict[str, Any]:
    alone = {"a-clinic": {"auc": 0.8, "accuracy": 0.7}, "b-clinic": {"auc": 0.82, "accuracy": 0.72}}
    return {
        "task": "heart",
        "seed": 7,
        "sites": list(alone),
        "regions": ["north"],
        "cipher": "bfv",
        "value_bits": 8,
        "mode": "async",
        "n_parameters": 1000,
        "wall_s": 60.0,
        "versions": 2,
        "updates_accepted": 4,
        "updates_rejected": 0,
        "refusals": {},
        "federated": {"accuracy": 0.79, "auc": 0.9},
        "local": {"accuracy": 0.71, "auc": 0.81, "per_site": alone},
        "pooled": {"accuracy": 0.8, "auc": 0.91},
        "uplink_bytes": 30_000,
        "downlink_bytes": 20_000,
        "wan_bytes": 30_000,
        "uplink_bytes_per_parameter": 7.5,
        "staleness": {"mean": 0.5, "max": 1},
        "target_metric": "auc",
        "target": 0.85,
        "time_to_target_s": 2.5,
        "history": [],
        "site_figures": {},
        **changes,
    }


def cells(summary: Summary) -> list[list[str]]:
    console = Console(file=io.StringIO(), width=100, record=True)
    console.print(comparison(summary))
    lines = console.export_text().splitlines()
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]


def test_what_is_written_reads_back_with_local_means_beside_per_site(tmp_path: Path) -> None:
    summary = Summary.model_validate(figures())
    summary.write(tmp_path / "summary.json")
    text = (tmp_path / "summary.json").read_text(encoding="utf-8")
    local = json.loads(text)["local"]
    assert (local["auc"], local["per_site"]["b-clinic"]["auc"]) == (0.81, 0.82)
    assert Summary.model_validate_json(text) == summary


def test_what_the_federation_is_compared_with_may_fail() -> None:
    measured = Comparison(
        Worth({"auc": 0.9}),
        {"a-clinic": Worth({}, "training failed: the loss is not finite"), "b-clinic": Worth({"auc": 0.8})},
        Worth({}, "its process ended"),
    )
    run = {name: figures()[name] for name in RunFigures.model_fields if name in figures()}
    summary = summarise(RunFigures.model_validate(run), measured, 1.0)
    assert summary.mean_alone == {"auc": 0.8}
    assert json.loads(summary.model_dump_json())["failed"] == {
        "all data pooled": "its process ended",
        "a-clinic alone": "training failed: the loss is not finite",
    }
    assert [cells_of(summary, row) for row in compared(summary)] == [
        ["a-clinic alone, failed: training failed: the loss is not finite", "-", ""],
        ["b-clinic alone", "0.800", ""],
        ["mean hospital alone", "0.800", ""],
        ["the federation", "0.900", "+0.100"],
        ["all data pooled, failed: its process ended", "-", ""],
    ]


def test_the_figures_of_the_federation_stand_before_it_is_compared() -> None:
    assert Comparison(Worth({"auc": 0.9})).mean_alone == {}


def test_the_table_sets_the_federation_against_the_mean_alone_target_metric_first() -> None:
    rows = cells(Summary.model_validate(figures()))
    assert [row[0] for row in rows] == [
        "a-clinic alone",
        "b-clinic alone",
        "mean hospital alone",
        "the federation",
        "all data pooled",
    ]
    assert rows[1] == ["b-clinic alone", "0.820", "", "0.720", ""]
    assert rows[3] == ["the federation", "0.900", "+0.090", "0.790", "+0.080"]


def test_a_federation_that_is_worse_shows_a_negative_difference() -> None:
    rows = cells(Summary.model_validate(figures(federated={"auc": 0.8, "accuracy": 0.7})))
    assert rows[3] == ["the federation", "0.800", "-0.010", "0.700", "-0.010"]


def test_a_metric_that_one_hospital_lacks_is_a_dash() -> None:
    per_site = {"a-clinic": {"accuracy": 0.7}, "b-clinic": {"auc": 0.82, "accuracy": 0.72}}
    rows = cells(Summary.model_validate(figures(local={"accuracy": 0.71, "per_site": per_site})))
    assert rows[0] == ["a-clinic alone", "-", "", "0.700", ""]
    assert rows[3] == ["the federation", "0.900", "", "0.790", "+0.080"]


@pytest.mark.parametrize("local", [{"auc": 0.8}, {"auc": {"a-clinic": {"auc": 0.8}}, "per_site": {}}])
def test_local_must_be_means_and_per_site(local: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="per_site"):
        Summary.model_validate(figures(local=local))


def site_figures(**changes: Any) -> dict[str, Any]:
    figure = {"region": "north", "updates": 2, "sent_bytes": 1, "received_bytes": 1, "train_s": 1.0, "idle_share": 0.5}
    return {**figure, **changes}


def test_what_was_spent_is_shown_per_hospital_and_without_noise_nothing_is() -> None:
    assert spent(Summary.model_validate(figures())) is None
    assert spent(Summary.model_validate(figures(site_figures={"a-clinic": site_figures()}))) is None
    record = {"epsilon": 2.345, "delta": 1e-5, "n_passes": 7}
    shown = spent(
        Summary.model_validate(
            figures(
                site_figures={
                    "a-clinic": site_figures(record=record, budget_spent=True),
                    "b-clinic": site_figures(record={**record, "epsilon": None}, site=record),
                }
            )
        )
    )
    assert shown is not None
    assert [list(column.cells) for column in shown.columns[1:]] == [
        ["7", "7"],
        ["2.35", "no bound"],
        ["-", "2.35"],
        ["spent", ""],
    ]
    assert "1e-05" in str(shown.caption)
