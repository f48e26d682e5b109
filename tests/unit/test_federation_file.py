"""What a federation file says of links and slow sites."""

from pathlib import Path
from typing import Any

import pytest

from fednats.config import AggregatorSettings, CoordinatorSettings, load, parse
from fednats.errors import ConfigError
from fednats.provision.kits import provision
from fednats.provision.plan import Kits
from fednats.testbed.federation import FederationSettings, demo_federation
from fednats.testbed.wan import WanSettings

BAD = WanSettings(delay_ms=150, mbit=20)


def federation(**changes: Any) -> FederationSettings:
    raw = {
        "name": "small",
        "task": "breast-cancer",
        "regions": {"north": {"wan": {"delay_ms": 30}}, "south": {}},
        "sites": {name: {"region": "north" if name in "ab" else "south"} for name in "abcd"},
    }
    return parse({**raw, **changes}, FederationSettings, source="test")


def test_every_region_and_site_has_a_link_good_unless_it_says_otherwise() -> None:
    assert federation().links() == {
        "region-north": WanSettings(delay_ms=30),
        "region-south": WanSettings(),
        **{f"site-{name}": WanSettings() for name in "abcd"},
    }


def test_a_common_wan_is_for_the_leaf_links_without_one_of_their_own() -> None:
    links = federation().with_wan(BAD).links()
    assert links["region-north"] == WanSettings(delay_ms=30)
    assert links["region-south"] == BAD
    assert links["site-a"] == WanSettings()


def test_without_leaves_there_are_no_leaf_links() -> None:
    flat = federation(leaves=False, regions={"north": {}, "south": {}})
    assert set(flat.links()) == {f"site-{name}" for name in "abcd"}
    with pytest.raises(ConfigError, match="leaf links"):
        flat.with_wan(BAD)
    with pytest.raises(ConfigError, match=r"regions.north.wan: it is for the leaf link"):
        federation(leaves=False)


def test_a_site_s_link_is_its_own() -> None:
    sites = {name: {"region": "north" if name in "ab" else "south", "wan": {"mbit": 5}} for name in "abcd"}
    assert federation(sites=sites).links()["site-c"] == WanSettings(mbit=5)


def test_slow_sites() -> None:
    slow = federation().with_slow({"a": 10.0, "d": 2.0})
    assert {name: site.slow_factor for name, site in slow.sites.items()} == {"a": 10, "b": 1, "c": 1, "d": 2}


@pytest.mark.parametrize(
    ("factors", "expected"), [({"e": 2.0}, "no such site; there are a, b, c, d"), ({"a": 0.5}, "1 or more")]
)
def test_a_wrong_slow_site_is_named(factors: dict[str, float], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        federation().with_slow(factors)


@pytest.mark.parametrize("task", ["ct-nodule", "breast-cancer"])
def test_a_demo_has_noise_if_asked_for_and_only_then(task: str) -> None:
    def demo(*, dp: bool) -> FederationSettings:
        return demo_federation(task, n_sites=4, n_regions=2, seed=0, cipher="bfv", synchronous=False, data=None, dp=dp)

    noisy, plain = demo(dp=True), demo(dp=False)
    assert plain.training.dp is None
    assert noisy.training.dp is not None
    assert noisy.training.dp.noise_multiplier > 1
    assert noisy.run_settings().training == noisy.training
    assert noisy.sites == plain.sites


def test_where_a_hospital_s_account_is_is_not_for_the_federation_file() -> None:
    sites = {name: {"region": "north" if name in "ab" else "south"} for name in "abcd"}
    policy = {"budget": {"max_epsilon": 8.0}, "privacy_account": "privacy.sqlite"}
    with pytest.raises(ConfigError, match="privacy_account is a file at the hospital"):
        federation(sites={**sites, "a": {"region": "north", "policy": policy}})


def test_registered_cases_are_in_the_kits_of_those_who_weigh_by_them_and_no_less_than_all_of_a_region_s(
    tmp_path: Path,
) -> None:
    cases = {"a": 5000, "b": 100, "c": 90}  # nothing is known of d
    sites = {
        name: {"region": "north" if name in "ab" else "south", **({"n_samples": cases[name]} if name in cases else {})}
        for name in "abcd"
    }
    provision(federation(sites=sites).plan(), tmp_path)
    kits = Kits(tmp_path)
    coordinator = load(kits.coordinator / "coordinator.toml", CoordinatorSettings, {})
    north, south = (load(kits.region(name) / "aggregator.toml", AggregatorSettings, {}) for name in ("north", "south"))
    assert north.n_samples == {"a": 5000, "b": 100}
    assert south.n_samples == {"c": 90}
    assert coordinator.n_samples == {"north": 5100}
    with pytest.raises(ConfigError, match="n_samples"):
        federation(sites={**sites, "d": {"region": "south", "n_samples": 0}})
