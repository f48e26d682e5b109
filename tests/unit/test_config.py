from pathlib import Path

import pytest

from fednats.config import BusSettings, DeltaSettings, RunSettings, SiteSettings, load, parse
from fednats.errors import ConfigError
from fednats.testbed.federation import FederationSettings

SITE = """
run = "r"
site = "ward"
region = "north"
state_dir = "/tmp/ward"
signers_file = "signers.toml"
model_key_file = "model.key"
[bus]
url = "tls://127.0.0.1:4222"
[task]
path = "heart"
"""


def write(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "site.toml"
    file.write_text(text)
    return file


def test_a_file_becomes_settings_with_defaults(tmp_path: Path) -> None:
    settings = load(write(tmp_path, SITE), SiteSettings, {})
    assert settings.bus == BusSettings(url="tls://127.0.0.1:4222")
    assert settings.drain_s == 20.0


def test_the_environment_overrides_the_file(tmp_path: Path) -> None:
    environment = {"FEDNATS_BUS__URL": "tls://elsewhere:4222", "FEDNATS_DRAIN_S": "3", "HOME": "/root"}
    settings = load(write(tmp_path, SITE), SiteSettings, environment)
    assert (settings.bus.url, settings.drain_s) == ("tls://elsewhere:4222", 3.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (SITE + "\n[web]\nprot = 8080\n", "web.prot: unknown setting"),
        (SITE.replace('site = "ward"\n', ""), "site: missing"),
        (SITE.replace("tls://", "nats://"), "bus.url"),
        (SITE.replace('"ward"', '"ward.7"'), "site: "),
        ("run = ", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_refused_naming_file_and_key(tmp_path: Path, text: str, expected: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load(file, SiteSettings, {})
    assert str(raised.value).startswith(str(file))
    assert expected in str(raised.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent\.toml: no such file"):
        load(tmp_path / "absent.toml", SiteSettings, {})


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        DeltaSettings().cipher = "none"  # type: ignore[misc]


def test_top_k_needs_the_unencrypted_cipher() -> None:
    with pytest.raises(ConfigError, match=r"delta: .*top_k below 1"):
        parse({"name": "r", "delta": {"top_k": 0.1}}, RunSettings, source="run")


def federation(**changes: object) -> FederationSettings:
    raw: dict[str, object] = {
        "name": "f",
        "task": "heart",
        "regions": {"north": {}, "south": {}},
        "sites": {name: {"region": region} for name, region in zip("abcd", ["north"] * 2 + ["south"] * 2, strict=True)},
    }
    return parse({**raw, **changes}, FederationSettings, source="f.toml")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sites": {"a": {"region": "west"}, "b": {"region": "north"}}}, "there is no region 'west'"),
        ({"regions": {"north": {}, "south": {}, "empty": {}}}, "regions.empty: no site"),
        ({"regions": {"north": {"parent": "south"}, "south": {"parent": "north"}}}, "circular"),
        ({"aggregation": {"min_sites": 3}}, "no sum of fewer than"),
        ({"regions": {"north": {"parent": "south"}, "south": {}}}, "delta.tiers"),
    ],
)
def test_a_federation_that_cannot_work_is_refused(changes: dict[str, object], expected: str) -> None:
    with pytest.raises(ConfigError) as raised:
        federation(**changes)
    assert expected in str(raised.value)


def test_a_federation_knows_its_tree() -> None:
    tree = federation(regions={"north": {"parent": "south"}, "south": {}}, delta={"tiers": 2})
    assert tree.children_of(None) == ("south",)
    assert (tree.depth("north"), tree.depth("south"), tree.tiers) == (2, 1, 2)
    assert tree.sites_of("north") == ("a", "b")
