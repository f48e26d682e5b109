"""A daemon's state and keys are its own."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w

from fednats.config import AggregatorSettings, CoordinatorSettings, SiteSettings, load
from fednats.errors import ConfigError
from fednats.services.state_dir import own


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_what_a_daemon_writes_is_closed_to_others_also_where_it_was_open(tmp_path: Path) -> None:
    state = tmp_path / "deep" / "state"
    state.mkdir(parents=True)
    with own(state):
        (state / "outbox.sqlite").write_text("deltas")
        (tmp_path / "privacy.sqlite").write_text("")
        assert state.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o777 for path in (state / "outbox.sqlite", tmp_path / "privacy.sqlite")} == {
            0o600
        }


def test_one_daemon_at_a_time_and_the_next_after_it_even_if_it_was_killed(tmp_path: Path) -> None:
    program = "import sys\nfrom pathlib import Path\nfrom fednats.services.state_dir import own\n"
    program += "with own(Path(sys.argv[1])):\n    print(flush=True)\n    sys.stdin.read()\n"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], **pipes) as other:  # type: ignore[call-overload]
        other.stdout.readline()
        with pytest.raises(ConfigError, match=rf"a daemon runs on {tmp_path} already"), own(tmp_path):
            pass
        other.kill()
        other.wait()
    for _ in range(2):
        with own(tmp_path):
            pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"state_dir: .*/file/state cannot be made"), own(tmp_path / "file" / "state"):
        pass


BUS = {"url": "tls://localhost:4222", "nkey_seed_file": "own.nk"}
COMMON = {"run": "r", "state_dir": "state", "signers_file": "signers.toml", "bus": BUS}
KEYS = {"model_key_file": "model-2.key", "older_model_key_file": "model-1.key"}
SITE = {**COMMON, **KEYS, "site": "a", "region": "north", "task": {"path": "heart"}}
AGGREGATOR = {**COMMON, "region": "north", "uplink": {**BUS, "nkey_seed_file": "uplink.nk"}}
COORDINATOR = {
    **COMMON,
    **KEYS,
    "regions": ["north"],
    "task": {"path": "heart"},
    "settings": {"name": "r"},
    "secret_key_file": "epoch-2.secret",
    "older_secret_key_file": "epoch-1.secret",
}


@pytest.mark.parametrize(
    ("cls", "raw", "setting", "name"),
    [
        (SiteSettings, SITE, "bus.nkey_seed_file", "own.nk"),
        (SiteSettings, SITE, "model_key_file", "model-2.key"),
        (SiteSettings, SITE, "older_model_key_file", "model-1.key"),
        (AggregatorSettings, AGGREGATOR, "uplink.nkey_seed_file", "uplink.nk"),
        (CoordinatorSettings, COORDINATOR, "secret_key_file", "epoch-2.secret"),
        (CoordinatorSettings, COORDINATOR, "older_secret_key_file", "epoch-1.secret"),
    ],
)
@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_key_that_others_may_read_keeps_the_daemon_from_starting(
    tmp_path: Path,
    cls: type[SiteSettings | AggregatorSettings | CoordinatorSettings],
    raw: dict[str, object],
    setting: str,
    name: str,
    mode: int,
) -> None:
    settings, key = tmp_path / "daemon.toml", tmp_path / name
    settings.write_text(tomli_w.dumps(raw))
    key.write_text("secret")
    key.chmod(0o600)
    load(settings, cls, {})
    key.chmod(mode)
    with pytest.raises(ConfigError, match=rf"{setting}: .*{name} is secret, and others may read it .* chmod 600 /"):
        load(settings, cls, {})
