"""Names that people choose."""

import pytest

from fednats.config import SiteSettings, parse
from fednats.errors import ConfigError
from fednats.names import check_name, suggested
from fednats.provision.new_key import new_key
from fednats.provision.plan import Plan
from fednats.testbed.federation import FederationSettings

RAW = {
    "name": "ward",
    "task": "breast-cancer",
    "regions": {"north": {}},
    "sites": {"a": {"region": "north"}, "b": {"region": "north"}},
}


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("müller klinik", "mueller-klinik"),
        ("Köln-Süd", "Koeln-Sued"),
        ("Cafe\u0301 1", "Cafe-1"),  # with a combining accent, as macOS writes it
        ("St. Mary's", "St-Mary-s"),
        ("-north", "north"),
        ("a/../b", "a-b"),
        ("x" * 70, "x" * 64),
    ],
)
def test_a_name_that_is_none_is_refused_with_what_is_allowed_and_one_that_is(name: str, instead: str) -> None:
    with pytest.raises(ValueError, match=f"letters a to z, digits, - and _ are allowed.*take '{instead}'$"):
        check_name(name)
    assert check_name(instead) == instead == suggested(name)


@pytest.mark.parametrize("name", ["", "病院", "---"])
def test_where_nothing_can_be_kept_nothing_is_suggested(name: str) -> None:
    with pytest.raises(ValueError, match=r"at the beginning$"):
        check_name(name)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"name": "müller klinik"}, "name"),
        ({"regions": {"müller klinik": {}}}, "regions"),
        ({"sites": {"müller klinik": {"region": "north"}}}, "sites"),
        ({"sites": {"a": {"region": "müller klinik"}}}, "sites.a.region"),
    ],
)
def test_a_federation_file_says_which_name_and_what_instead(change: dict[str, object], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}.*'müller klinik' cannot be a name.*take 'mueller-klinik'"):
        parse({**RAW, **change}, FederationSettings, source="federation.toml")


def test_settings_and_keys_take_the_same_names() -> None:
    with pytest.raises(ConfigError, match=r"; site: '-a' cannot be a name"):
        parse({"site": "-a"}, SiteSettings, source="site.toml")
    with pytest.raises(ConfigError, match=r"site\.müller klinik: 'müller klinik' cannot be a name"):
        new_key("site.müller klinik", None)  # type: ignore[arg-type]  # nothing is written
    with pytest.raises(ConfigError, match="region hub: that is the name of the node above"):
        parse(
            {"run": {"name": "r"}, "regions": [{"name": "hub"}], "task": {"path": "heart"}}, Plan, source="federation"
        )
