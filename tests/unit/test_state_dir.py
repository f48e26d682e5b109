"""A daemon's state and keys are its own."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tomli_w

from fednats.config import AggregatorSettings, CoordinatorSettings, SiteSettings, load
from fednats.errors import ConfigError
from fednats.secret_file import check_closed
from fednats.services.daemon.state_dir import own

NOBODY, GROUP = 65534, 2000


@contextmanager
def as_nobody() -> Iterator[None]:
    """Be a user that is not root, with the group that root gave to files."""
    groups, umask = os.getgroups(), os.umask(0o022)
    os.setgroups([GROUP])
    os.setegid(GROUP)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)
        os.umask(umask)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Return a folder that other users can reach; ``tmp_path`` is closed to them."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture(autouse=True)
def _umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_what_a_daemon_writes_is_closed_to_others_also_where_the_folder_was_open(tmp_path: Path) -> None:
    made, found = tmp_path / "deep" / "state", tmp_path / "volume"
    found.mkdir(mode=0o755)
    for state in (made, found):
        with own(state):
            (state / "outbox.sqlite").write_text("deltas")
            (tmp_path / "privacy.sqlite").write_text("")
            written = (state / "outbox.sqlite", state / "daemon.lock", tmp_path / "privacy.sqlite")
            assert {path.stat().st_mode & 0o777 for path in written} == {0o600}
        (tmp_path / "privacy.sqlite").unlink()
    assert made.stat().st_mode & 0o777 == 0o700


def test_a_folder_that_the_daemon_did_not_make_keeps_its_mode_also_at_the_end_of_a_link(tmp_path: Path) -> None:
    volume, link = tmp_path / "volume", tmp_path / "state"
    volume.mkdir(mode=0o755)
    link.symlink_to(volume)
    with own(link):
        pass
    assert volume.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707])
def test_a_folder_in_which_others_may_write_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    volume.chmod(mode)
    with pytest.raises(ConfigError, match=rf"others may write in {volume} .*such as {volume}/state"), own(volume):
        pass
    assert list(volume.iterdir()) == []
    assert volume.stat().st_mode & 0o777 == mode
    with own(volume / "state"):
        pass


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to root and run as another user")


@needs_root
def test_a_volume_of_root_with_the_group_of_the_daemon_is_taken_as_it_is(open_folder: Path) -> None:
    """Kubernetes: with ``fsGroup`` a volume is root's, its group may write, and nobody can change that."""
    volume = open_folder / "volume"
    volume.mkdir()
    os.chown(volume, 0, GROUP)
    volume.chmod(0o2770)
    with as_nobody(), own(volume):
        assert (volume / "daemon.lock").stat().st_uid == NOBODY
    assert volume.stat().st_mode & 0o7777 == 0o2770


def test_one_daemon_at_a_time_and_the_next_after_it_even_if_it_was_killed(tmp_path: Path) -> None:
    program = "import sys\nfrom pathlib import Path\nfrom fednats.services.daemon.state_dir import own\n"
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


@needs_root
@pytest.mark.parametrize("mode", [0o440, 0o640, 0o400])
def test_a_secret_of_root_that_only_its_group_may_read_is_taken(open_folder: Path, mode: int) -> None:
    """PostgreSQL's rule, and what Kubernetes makes of ``defaultMode: 0400`` with ``fsGroup``."""
    key = open_folder / "own.nk"
    key.write_text("secret")
    os.chown(key, 0, GROUP)
    key.chmod(mode)
    with as_nobody():
        check_closed(key)


@needs_root
@pytest.mark.parametrize(("mode", "owner"), [(0o444, 0), (0o660, 0), (0o640, NOBODY), (0o644, 0), (0o640, 1234)])
def test_other_secrets_that_others_may_read_are_refused_with_mode_owner_and_remedy(
    open_folder: Path, mode: int, owner: int
) -> None:
    key = open_folder / "own.nk"
    key.write_text("secret")
    os.chown(key, owner, GROUP)
    key.chmod(mode)
    with (
        as_nobody(),
        pytest.raises(ValueError, match=rf"mode {mode:o}, owner {owner}\): chmod 600 .*defaultMode 0440 and fsGroup"),
    ):
        check_closed(key)


@needs_root
def test_a_container_s_secret_is_taken_from_a_read_only_mount_in_memory_alone(open_folder: Path) -> None:
    """Docker: root's, mode 0444, on a read-only tmpfs; Kubernetes leads to it by symbolic links."""
    mount, key, link = open_folder / "secrets", open_folder / "secrets" / "own.nk", open_folder / "link.nk"
    mount.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "fednats-test", str(mount)], check=False)
    if mounted.returncode:
        pytest.skip("this machine mounts no tmpfs")
    try:
        key.write_text("secret")
        key.chmod(0o444)
        link.symlink_to(key)
        with pytest.raises(ValueError, match="others may read it"):
            check_closed(key)
        subprocess.run(["mount", "-o", "remount,ro", str(mount)], check=True)
        for user in (as_nobody(), contextlib.nullcontext()):
            with user:
                check_closed(key)
                check_closed(link)
    finally:
        subprocess.run(["umount", "--lazy", str(mount)], check=True)
