"""What the documents promise is what the code does."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch

from fednats.config import RunSettings, SiteSettings, parse
from fednats.data.column import MISSING
from fednats.data.csv_file import Format, format_of
from fednats.provision.plan import LeafAddress, ServerAddress
from fednats.testbed.federation import FederationSettings

ROOT = Path(__file__).parents[2]


def blocks(file: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / file).read_text(), re.DOTALL)


def test_the_federation_file_s_document_shows_every_setting_with_its_default() -> None:
    (text,) = blocks("docs/federation-file.md", "toml")
    documented = tomllib.loads(re.sub(r"^# (?=[a-z_]+ = )", "", text, flags=re.MULTILINE))
    optional = {
        ("aggregation", "deadline_s"),
        ("stop", "max_wall_s"),
        ("server", "learning_rate"),
        ("stop", "target_metric"),
        ("stop", "lower_is_better"),
        ("stop", "target"),
        ("training", "dp"),
        ("delta", "dp"),
        ("regions", "north", "parent"),
        ("wan", "mbit"),
        ("wan", "cut_at_s"),
        ("wan", "cut_for_s"),
        ("wan", "cut_every_s"),
    }
    required = {"name", "task", "regions", "sites"}
    documented["regions"]["europe"] = {}
    documented["sites"] |= {f"b{i}": {"region": "north" if i else "europe"} for i in range(3)}
    documented["delta"]["tiers"] = 2
    federation = parse(documented, FederationSettings, source="docs")
    assert set(FederationSettings.model_fields) == set(documented)
    documented["wan"] = documented["regions"]["north"]["wan"]
    sections = {
        name: getattr(federation, name) for name in ("training", "server", "aggregation", "delta", "stop", "defence")
    }
    documented |= {f"{section}.dp": documented[section]["dp"] for section in ("training", "delta")}
    sections |= {"training.dp": federation.training.dp, "delta.dp": federation.delta.dp}
    for section, settings in {**sections, "wan": federation.regions["north"].wan}.items():
        fields = type(settings).model_fields
        assert set(fields) == set(documented[section])
        for name, field in fields.items():
            if (section, name) in optional or (section, name) in {("delta", "tiers"), ("aggregation", "staleness")}:
                continue
            assert documented[section][name] == field.default, f"{section}.{name}"
    assert documented["aggregation"]["staleness"] == type(federation.aggregation.staleness)().model_dump()
    for name in ("seed", "leaves", "options"):
        assert documented[name] == FederationSettings.model_fields[name].get_default(call_default_factory=True)
    for address, cls in ((documented["bus"], ServerAddress), (documented["regions"]["north"]["bus"], LeafAddress)):
        assert set(address) == set(cls.model_fields)
        required_or_placed = {"port", "leaf_port", "monitor_port", "upstream"}
        assert {name: address[name] for name in set(address) - required_or_placed} == cls().model_dump(
            exclude_none=True
        )
    assert required <= set(documented)


def test_the_run_in_the_document_is_one() -> None:
    (text,) = blocks("docs/runs.md", "toml")
    assert parse(tomllib.loads(text), RunSettings, source="docs/runs.md").stop.max_versions == 60


def test_the_readme_s_federation_is_one() -> None:
    (text,) = blocks("README.md", "toml")
    raw: dict[str, Any] = tomllib.loads(text)
    raw["sites"] |= {name: {"region": region} for name, region in (("b", "north"), ("c", "south"), ("d", "south"))}
    assert parse(raw, FederationSettings, source="README.md").stop.max_versions == 20


def test_the_readme_s_task_is_the_shipped_example() -> None:
    (text,) = blocks("README.md", "python")
    example = (ROOT / "sites" / "own_task.py").read_text()
    without_docstrings = re.sub(r'^        """.*?"""\n', "", example, flags=re.MULTILINE)
    assert text.strip() in without_docstrings


def test_the_document_of_data_states_every_format_and_its_examples_run() -> None:
    examples: dict[str, Any] = {}
    for text in blocks("docs/data.md", "python"):
        exec(text, examples)  # noqa: S102 - what a reader does with it
    inputs = torch.zeros(2, examples["MOLES"].channels, *examples["MOLES"].size)
    assert examples["resnet"]()(inputs).shape == (2, 1)
    document = (ROOT / "docs" / "data.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", document, re.MULTILINE)) >= set(Format.model_fields)
    assert all(f"`{marker}`" in document for marker in MISSING if marker)
    (options,) = (tomllib.loads(text)["options"] for text in blocks("docs/data.md", "toml"))
    assert format_of(options["csv_format"]).decimal == ","


def test_the_example_settings_of_a_site_are_valid() -> None:
    raw = tomllib.loads((ROOT / "sites" / "site.toml").read_text())
    assert parse(raw, SiteSettings, source="site.toml").task.path == "own_task.py:MyTask"


def test_the_tests_that_the_table_of_faults_names_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / "reliability.md").read_text()))
    written = "".join(file.read_text() for file in (ROOT / "tests").rglob("test_*.py"))
    assert {name for name in named if f"def {name}(" not in written} == set()
    assert len(named) > 20


@pytest.mark.parametrize(
    "document",
    ["CONTRIBUTING.md", "SECURITY.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))],
)
def test_the_files_that_a_document_names_are_there(document: str) -> None:
    text = (ROOT / document).read_text()
    named = set(re.findall(r"`((?:tests|fednats|sites|bus)/[\w/]+\.\w+)`", text))
    linked = set(re.findall(r"\]\(([^)#:]+)", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    assert {link for link in linked if not ((ROOT / document).parent / link).exists()} == set()
