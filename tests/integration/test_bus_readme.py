from math import ceil
from pathlib import Path

from fednats import permissions
from fednats.config import parse
from fednats.provision.plan import Plan, RegionPlan
from fednats.provision.servers import store_bytes
from fednats.transport import streams

README = (Path(__file__).parents[2] / "bus" / "README.md").read_text(encoding="utf-8")


def test_the_readmes_permissions_are_the_rendered_ones() -> None:
    table = README.split("<!-- permissions: begin -->\n")[1].split("<!-- permissions: end -->")[0]
    assert table.strip() == permissions.table().strip()


def test_the_readmes_limits_are_the_streams() -> None:
    made = {
        "fed_<run>_models_hub": streams.at_hub("<run>", ["<region>"])[0],
        "fed_<run>_inbox_<node>_<region>": streams.at_hub("<run>", ["<region>"])[1],
        "fed_<run>_models_<region>": streams.at_uplink("<run>", "<region>")[0],
        "fed_<run>_aggregates_<region>": streams.at_uplink("<run>", "<region>")[1],
        "fed_<run>_updates_<region>_<site>": streams.updates("<run>", "<region>", "<site>"),
    }
    for name, spec in made.items():
        row = next(line for line in README.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {spec.limits.max_bytes // streams.GIB} GiB | {spec.limits.max_age_s // 86400} days |" in row
        assert all(f"`{subject}`" in row for subject in spec.subjects)
        assert ("drops the oldest" in row) == (spec.discard == "old")


def test_the_readmes_limits_of_rejects_are_the_streams() -> None:
    for spec in (
        streams.at_hub("<run>", ["<region>"])[-1],
        streams.in_region("<run>", "<region>", ["<site>"])[-1],
    ):
        limits = spec.limits
        row = next(line for line in README.splitlines() if line.startswith("| `fed_<run>_rejects_<node>`"))
        assert spec.name.replace("hub", "<node>").replace("<region>", "<node>") in row
        assert f"| {limits.max_bytes // 2**30} GiB, the newest {limits.max_messages_per_subject} of each" in row
        assert f"| {limits.max_age_s // 86400} days | drops the oldest |" in row


def test_the_readmes_stores_are_what_provisioning_asks_for() -> None:
    def gibibytes(node: str, regions: tuple[RegionPlan, ...], *, leaves: bool = True) -> float:
        raw = {"run": {"name": "r"}, "regions": regions, "task": {"path": "heart"}, "leaves": leaves}
        return store_bytes(parse(raw, Plan, source="test"), node) / streams.GIB

    one, below = RegionPlan("a", ("x", "y")), RegionPlan("b", ("v", "w"), parent="a")
    hub, leaf, above = gibibytes("hub", (one,)), gibibytes("a", (one,)), gibibytes("a", (one, below))
    alone = gibibytes("hub", (one,), leaves=False) - hub
    text = " ".join(README.split())
    assert (
        f"the hub needs {ceil(hub)} GB, a leaf {ceil(leaf)} GB, a leaf with regions below it {ceil(above)} GB" in text
    )
    assert f"a hub without leaves {ceil(hub)} GB and {ceil(alone)} GB more for each region" in text
    assert f"Each site more takes {streams.UPDATES.max_bytes // streams.GIB} GB" in text
    assert f"each region below {streams.INBOX.max_bytes // streams.GIB} GB" in text
