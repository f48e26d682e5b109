"""``fednats check``: try a task on this machine before it takes part in a run."""

import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fednats.config import DeltaSettings, RecordPrivacySettings, SiteSettings, TaskSettings, TrainingSettings, load
from fednats.errors import ConfigError

if TYPE_CHECKING:
    from fednats.learning.task_code import Check
    from fednats.services.site.task_check import Step

commands = typer.Typer()


@dataclass(frozen=True)
class Target:
    """One task at one site, with the settings to try it with."""

    title: str
    task: TaskSettings
    training: TrainingSettings
    delta: DeltaSettings
    check_code: "Check | None" = None


@commands.command()
def check(
    target: Annotated[
        str,
        typer.Argument(
            metavar="TASK|site.toml|federation.toml",
            help="a shipped task, path:ClassName of a file, folder or wheel, a site's settings, or a federation with all its sites",
        ),
    ],
    options: Annotated[
        list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="option of the task, such as csv=a.csv")
    ] = None,
    dp: Annotated[bool, typer.Option("--dp", help="try differential privacy as well; charges nothing")] = False,  # noqa: FBT002
) -> None:
    """Try a task on this machine: data, one batch, one evaluation, one update. Nothing is sent.

    Exits with code 1 if a step fails. See docs/tasks.md.
    """
    from fednats.provision.epochs import throwaway_public_key  # noqa: PLC0415 - torch and TenSEAL
    from fednats.services.site.task_check import TaskCheck  # noqa: PLC0415

    failed = 0
    for one in _targets(target, options or [], dp=dp):
        typer.echo(one.title)
        public_key = throwaway_public_key(one.delta)
        for step in TaskCheck(one.task, one.training, one.delta, public_key, one.check_code).steps():
            _print(step)
            failed += bool(step.failure)
    if failed:
        raise typer.Exit(1)
    typer.echo("The check passed; nothing was sent.")


def _print(step: "Step") -> None:
    typer.echo(f"  {'FAILED' if step.failure else 'ok':<7}{step.name}")
    for line in step.lines:
        typer.echo(f"           {line}")
    for warning in step.warnings:
        typer.echo(f"  warning  {warning}")
    if step.failure:
        typer.echo(step.failure.rstrip(), err=True)


def _targets(target: str, options: Sequence[str], *, dp: bool) -> Iterator[Target]:
    if not target.endswith(".toml"):
        yield _of_task(f"task {target}", TaskSettings(path=target, options=dict(map(_option, options))), dp=dp)
        return
    if options:
        raise ConfigError(f"--option: {target} has the options of its tasks; set them there")
    file = Path(target)
    if "sites" in _raw(file) and "regions" in _raw(file):
        yield from _of_federation(file, dp=dp)
    else:
        yield _of_site(load(file, SiteSettings), dp=dp)


def _of_task(title: str, task: TaskSettings, *, dp: bool, check_code: "Check | None" = None) -> Target:
    from fednats.learning.task_code import load_task  # noqa: PLC0415 - torch

    recommended = load_task(task.path, check_code).recommended
    training = (dp and recommended.private) or recommended.training
    return Target(title, task, _with_noise(training) if dp else training, DeltaSettings(), check_code)


def _of_site(settings: SiteSettings, *, dp: bool) -> Target:
    from fednats.privacy.policy import read_policy  # noqa: PLC0415
    from fednats.services.daemon.keys import read_keys  # noqa: PLC0415

    read_keys(settings.public_key_file, settings.older_public_key_file, "public_key_file")
    policy = read_policy(settings.policy_file)
    check_code = policy.check_task if policy.task_sha256 else None
    return _of_task(f"site {settings.site}", settings.task, dp=dp or policy.budget is not None, check_code=check_code)


def _of_federation(file: Path, *, dp: bool) -> Iterator[Target]:
    from fednats.testbed.federation import load_federation  # noqa: PLC0415

    federation = load_federation(file)
    training = _with_noise(federation.training) if dp else federation.training
    for name in federation.sites:
        yield Target(f"site {name}", federation.task_of(name), training, federation.delta)


def _with_noise(training: TrainingSettings) -> TrainingSettings:
    return training if training.dp else training.model_copy(update={"dp": RecordPrivacySettings()})


def _raw(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not valid TOML ({error})") from error


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--option {text}: give KEY=VALUE, such as csv=a.csv")
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value  # text without quotes
