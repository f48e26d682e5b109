import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fednats.testbed import plots
from fednats.testbed.report import write_report
from fednats.testbed.summary import Summary

HOSTILE = '<script>alert("$1")</script>'


def seen(at: int) -> dict[str, Any]:
    staleness = 1 if at else None
    return {"at_s": 2.0 * at, "updates": at, "staleness": staleness, "sent_bytes": 9000 * at, "received_bytes": 0}


def a_summary(**changes: Any) -> Summary:
    alone = {"a-clinic": {"auc": 0.8}, HOSTILE: {"auc": 0.82}}
    history = [
        {
            "version": version,
            "published_s": 1.25 * version,
            "evaluated_s": 1.5 * version,
            "n_sites": 2,
            "n_samples": 100,
            "metrics": {"auc": 0.7 + 0.1 * version},
            "means": [],
        }
        for version in range(3)
    ]
    site = {"region": "north", "received_bytes": 10_000, "train_s": 6.3, "idle_share": 0.25}
    return Summary.model_validate(
        {
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
            "updates_accepted": 3,
            "updates_rejected": 2,
            "refusals": {"too_stale": 2},
            "federated": {"auc": 0.9},
            "local": {"auc": 0.81, "per_site": alone},
            "pooled": {"auc": 0.91},
            "uplink_bytes": 23_250,
            "downlink_bytes": 20_000,
            "wan_bytes": 30_000,
            "uplink_bytes_per_parameter": 7.75,
            "staleness": {"mean": 0.5, "max": 4},
            "target_metric": "auc",
            "target": 0.85,
            "time_to_target_s": 2.5,
            "history": history,
            "cases": {
                "version": 2,
                "confusion": [[40, 5], [3, 52]],
                "roc": {"1": [[0.0, 0.0], [0.1, 0.9], [1.0, 1.0]]},
            },
            "timeline": {name: [seen(at) for at in range(4)] for name in alone},
            "site_figures": {
                "a-clinic": {**site, "updates": 2, "sent_bytes": 15_000},
                HOSTILE: {**site, "updates": 1, "sent_bytes": 8_250},
            },
            **changes,
        }
    )


def page(tmp_path: Path, **changes: Any) -> str:
    write_report(a_summary(**changes), tmp_path / "report.html")
    return (tmp_path / "report.html").read_text(encoding="utf-8")


class Reader(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th"}:
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.rows[-1][-1] += data


def test_it_needs_nothing_from_anywhere(tmp_path: Path) -> None:
    html = page(tmp_path)
    assert "http" not in html
    assert "@import" not in html
    tags = Reader(html).tags
    assert {tag for tag, _ in tags}.isdisjoint({"script", "link", "img", "iframe", "object"})
    pointers = [value or "" for _, attrs in tags for key, value in attrs.items() if key.endswith(("href", "src"))]
    assert pointers
    assert all(pointer.startswith("#") for pointer in pointers)


def test_its_plots_point_at_ids_that_are_there_once(tmp_path: Path) -> None:
    html = page(tmp_path)
    ids = [attrs["id"] for _, attrs in Reader(html).tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert html.count("<svg") == 8
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', html)) <= set(ids)


def test_it_has_every_sites_numbers_and_a_hostile_name_is_only_text(tmp_path: Path) -> None:
    rows = Reader(page(tmp_path)).rows
    assert ["a-clinic alone", "0.800", ""] in rows
    assert [f"{HOSTILE} alone", "0.820", ""] in rows
    assert ["the federation", "0.900", "+0.090"] in rows
    assert ["a-clinic", "north", "2", "6.3", "75%", "15.0 kB", "10.0 kB"] in rows
    assert ["a-clinic", "7.5 kB", "7.50"] in rows
    assert [HOSTILE, "8.2 kB", "8.25"] in rows
    assert ["too stale", "2"] in rows


def test_it_says_whether_the_target_was_met(tmp_path: Path) -> None:
    assert "auc 0.85, was reached after 2.5 s" in page(tmp_path)
    assert "auc 0.85, was not reached" in page(tmp_path, time_to_target_s=None)
    assert "No target was set" in page(tmp_path, target=None, time_to_target_s=None)


def test_a_run_in_the_clear_says_so(tmp_path: Path) -> None:
    html = page(tmp_path, cipher="none")
    assert "This run was not encrypted" in html
    assert "homomorphic" not in html
    assert "homomorphic" in page(tmp_path)


def test_the_cases_that_it_gets_wrong_are_shown(tmp_path: Path) -> None:
    rows = Reader(page(tmp_path)).rows
    assert ["class 0", "40", "5", "89%"] in rows
    assert ["class 1", "3", "52", "95%"] in rows
    html = page(tmp_path, cases={})
    assert "No confusion matrix and no ROC curve" in html
    assert html.count("<svg") == 7


def test_means_over_hospitals_are_not_called_pooled_nor_pooled_figures_means(tmp_path: Path) -> None:
    history = [{**entry, "metrics": {"rmse": 3.0}, "means": ["rmse"]} for entry in a_summary().model_dump()["history"]]
    html = page(tmp_path, history=history, target_metric="rmse", cases={})
    assert "Mean over hospitals: each hospital's own figure, weighted by its test cases" in unescape(html)
    assert "All test cases pooled" not in html
    assert "Mean over hospitals" not in page(tmp_path)
    assert "the hospitals send encrypted counts, and the figure" in page(tmp_path)
    assert "the hospitals send counts, and the figure" in page(tmp_path, cipher="none")


def test_a_task_is_called_by_its_name_not_by_its_file(tmp_path: Path) -> None:
    html = page(tmp_path, task="/home/ward/own.py:Sepsis")
    assert "<title>fednats: Sepsis, learned by 2 hospitals</title>" in html
    assert html.count("/home/ward/own.py:Sepsis") == 1  # among the settings


def test_a_plot_that_has_nothing_to_show_is_not_drawn_and_the_page_says_why(tmp_path: Path) -> None:
    assert "No evaluation has a value of c_index" in page(tmp_path, target_metric="c_index")
    assert "No version was evaluated" in page(tmp_path, history=[])
    assert "was not recorded" in page(tmp_path, timeline={})


def test_the_axis_of_the_comparison_fits_the_figures() -> None:
    (axes,) = plots.compared_on(a_summary(), "auc").axes
    assert axes.get_xlim()[0] > 0.7


def test_metrics_of_other_scales_have_axes_of_their_own(tmp_path: Path) -> None:
    both = [{**entry, "metrics": {**entry["metrics"], "ece": 0.1}} for entry in a_summary().model_dump()["history"]]
    assert plots.shown_metrics(a_summary(history=both)) == ["auc", "ece"]
    assert page(tmp_path, history=both).count("<svg") == page(tmp_path).count("<svg") + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"history": []},
        {"site_figures": {"a-clinic": {**a_summary().site_figures["a-clinic"].model_dump(), "updates": 0}}},
        {"federated": {"loss": -0.3}, "local": {"loss": -0.5, "per_site": {}}, "pooled": {}, "target_metric": "loss"},
    ],
    ids=["nothing evaluated", "a site that sent nothing", "a negative metric, no figures to compare with"],
)
def test_a_run_that_came_to_little_still_has_a_report(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert page(tmp_path, **changes).endswith("</html>\n")


def test_the_same_summary_gives_the_same_bytes(tmp_path: Path) -> None:
    assert page(tmp_path) == page(tmp_path)


def test_what_was_spent_is_in_the_report_of_a_run_with_noise_only(tmp_path: Path) -> None:
    write_report(a_summary(), tmp_path / "plain.html")
    assert "epsilon" not in (tmp_path / "plain.html").read_text(encoding="utf-8")
    figures = a_summary().model_dump()["site_figures"]
    figures[HOSTILE]["record"] = {"epsilon": 1.5, "delta": 1e-5, "n_passes": 3}
    write_report(a_summary(site_figures=figures), tmp_path / "noisy.html")
    page = (tmp_path / "noisy.html").read_text(encoding="utf-8")
    assert "epsilon of a record" in page
    assert "<td>1.50</td><td>-</td><td>1e-05</td>" in page
    assert HOSTILE not in page
