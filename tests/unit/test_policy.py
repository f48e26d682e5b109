"""A hospital's own word: what it does not allow is refused, by name, before anything runs or leaves."""

import re
import tomllib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest

from fednats.config import AggregationSettings, DeltaSettings, SitePrivacySettings, TrainingSettings
from fednats.errors import ConfigError, Reason, RefusedError
from fednats.learning.task_code import code_path, load_task
from fednats.messages import Grid, ModelManifest, ParameterSpec
from fednats.privacy.policy import NO_POLICY, Budget, Policy, read_policy
from fednats.services.daemon.off_loop import paced
from tests.makers import FIRST

SHIPPED = Path(__file__).parents[2] / "sites" / "policy.toml"


def written(tmp_path: Path, text: str) -> Policy:
    file = tmp_path / "policy.toml"
    file.write_text(text)
    return read_policy(file)


def asked(aggregation: AggregationSettings | None = None, delta: DeltaSettings | None = None) -> ModelManifest:
    return ModelManifest(
        run="r",
        opening=FIRST,
        version=0,
        task="own.py:Mine",
        seed=0,
        parameters=(ParameterSpec(name="body.weight", shape=(2, 2)), ParameterSpec(name="head.bias", shape=(2,))),
        weights_digest=b"0123456789abcdef",
        frames=(),
        grid=Grid(grid_id="g", steps=(1.0, 1.0)),
        grid_ids=("g",),
        key_id="k",
        training=TrainingSettings(),
        aggregation=aggregation or AggregationSettings(),
        delta=delta or DeltaSettings(),
    )


def test_the_shipped_file_shows_the_defaults() -> None:
    assert read_policy(SHIPPED) == Policy()
    every_line = re.sub(
        r"^# (?=max_mbit|privacy_account|\[budget\]|max_epsilon|delta)", "", SHIPPED.read_text(), flags=re.MULTILINE
    )
    assert set(tomllib.loads(every_line)) == set(Policy.model_fields)
    assert set(tomllib.loads(every_line)["budget"]) == set(Budget.model_fields)


def test_without_a_file_nothing_is_refused() -> None:
    read_policy(None).check_run(asked(delta=DeltaSettings(cipher="none")), n_samples=1)
    assert read_policy(None) is NO_POLICY


@pytest.mark.parametrize(
    ("text", "cipher", "why"),
    [
        ("", "none", "not encrypted"),
        ("min_sites = 3", "bfv", "sums 2 sites, the policy says min_sites = 3"),
        ("min_samples = 41", "bfv", "fewer training cases than the policy's min_samples = 41"),
        ("min_noise_multiplier = 0.5", "bfv", r"training\.dp\.noise_multiplier is 0, .* min_noise_multiplier = 0\.5"),
        ("min_site_noise_multiplier = 2", "bfv", r"delta\.dp\.noise_multiplier is 0, .* min_site_noise_multiplier = 2"),
        ('parameters = ["head.*"]', "bfv", "trains body.weight"),
    ],
)
def test_a_run_that_asks_for_more_is_refused(
    tmp_path: Path, text: str, cipher: Literal["bfv", "none"], why: str
) -> None:
    with pytest.raises(RefusedError, match=why) as raised:
        written(tmp_path, text).check_run(asked(delta=DeltaSettings(cipher=cipher)), n_samples=40)
    assert raised.value.reason is Reason.POLICY


def test_a_run_that_asks_for_no_more_is_taken(tmp_path: Path) -> None:
    text = 'min_sites = 3\nmin_samples = 40\nparameters = ["body.*", "head.bias"]\nencrypted = false\nmin_site_noise_multiplier = 2'
    delta = DeltaSettings(cipher="none", dp=SitePrivacySettings(noise_multiplier=2.0))
    run = asked(aggregation=AggregationSettings(min_sites=3), delta=delta)
    written(tmp_path, text).check_run(run, n_samples=40)


def test_code_that_was_not_read_is_not_run(tmp_path: Path) -> None:
    this, that = "1" * 64, "2" * 64
    policy = Policy(task_sha256=(this,))
    policy.check_task(tmp_path / "task.py", this)
    refusal = rf"task\.py has SHA-256 {that}, and task_sha256 in policy\.toml allows {this}; put the code back"
    with pytest.raises(ConfigError, match=refusal):
        policy.check_task(tmp_path / "task.py", that)
    Policy().check_task(tmp_path / "task.py", that)


def test_the_file_of_a_task_is_where_its_code_is(tmp_path: Path) -> None:
    for name in ("heart", "breast-cancer", "ct-nodule"):
        assert code_path(name).stem == load_task(name).__module__.rpartition(".")[2]
    assert code_path(f"{tmp_path}/own.py:Mine") == code_path(f"{tmp_path}/own.py") == tmp_path / "own.py"


@pytest.mark.parametrize(
    ("hours", "at", "wait_s"),
    [
        ((), "12:00", 0),
        (("20:00-06:00",), "19:00", 3600),
        (("20:00-06:00",), "20:00", 0),
        (("20:00-06:00",), "05:59", 0),
        (("20:00-06:00",), "06:00", 14 * 3600),
        (("12:00-13:00", "22:00-23:00"), "13:00", 9 * 3600),
        (("12:00-13:00",), "14:00", 22 * 3600),
    ],
)
def test_training_waits_for_its_hours(hours: tuple[str, ...], at: str, wait_s: float) -> None:
    now = datetime.combine(datetime(2026, 3, 1, tzinfo=UTC), datetime.strptime(at, "%H:%M").time(), UTC)  # noqa: DTZ007
    assert Policy(hours=hours).opens_in_s(now) == wait_s


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('hours = ["8 to 5"]', "no span of hours"),
        ('task_sha256 = ["abc"]', "is no SHA-256"),
        ("max_mbit = 0", "max_mbit"),
        ("[budget]\ndelta = 1e-6", "budget.max_epsilon: missing"),
        ("allow_all = true", "allow_all: unknown setting"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        written(tmp_path, text)


def test_the_environment_does_not_loosen_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDNATS_MIN_SITES", "1")
    assert written(tmp_path, "").min_sites == 2


async def test_sending_is_held_to_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []

    async def nap(seconds: float) -> None:
        naps.append(seconds)

    monkeypatch.setattr("fednats.services.daemon.off_loop.asyncio.sleep", nap)

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield bytes(125_000)

    assert [len(chunk) async for chunk in paced(chunks(), None)] == [125_000] * 3
    assert naps == []
    assert [len(chunk) async for chunk in paced(chunks(), 1.0)] == [125_000] * 3
    assert naps == pytest.approx([1.0, 2.0, 3.0], abs=0.1)
