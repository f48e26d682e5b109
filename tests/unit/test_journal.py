from pathlib import Path

import pytest

from fednats.errors import ConfigError
from fednats.protocol.events import Combined, ContributionArrived, Event
from fednats.storage.journal import Journal
from tests.makers import aggregate, announcement, update


def test_a_journal_gives_back_its_events(tmp_path: Path) -> None:
    events: list[Event] = [
        announcement(),
        ContributionArrived(head=update("a")),
        ContributionArrived(head=aggregate("fjord")),
        Combined(combination_id="c"),
    ]
    journal = Journal(tmp_path / "journal.sqlite")
    for event in events:
        journal.append(event)
    assert list(Journal(tmp_path / "journal.sqlite").replay()) == events


def test_a_journal_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.sqlite").write_text("not a database, and long enough to be looked at as one\n" * 40)
    with pytest.raises(ConfigError, match=r"journal\.sqlite"):
        Journal(tmp_path / "journal.sqlite")
