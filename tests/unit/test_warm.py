"""The parent that a testbed's daemons are forked from."""

from importlib.util import find_spec

from fednats.testbed.warm import PRELOADED


def test_what_the_parent_loads_is_there() -> None:
    """The fork server ignores what it cannot import."""
    assert [name for name in PRELOADED if find_spec(name) is None] == []
