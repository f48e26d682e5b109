"""Initial weights of a run, from a safetensors file."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fednats.errors import ConfigError
from fednats.learning.entries import LOG_SUFFIX, StateEntry, entries_of, frozen_of


def load_weights(model: nn.Module, file: Path) -> None:
    """Copy the travelling tensors from ``file`` into ``model``; its frozen floating-point tensors must be the same.

    ``file`` is an ``output/model.safetensors`` or the state dict of such a model, or a coordinator's checkpoint, which
    holds logarithms of variances and no frozen tensors.

    Raises:
        ConfigError: the file cannot be read, or does not fit; the text names the first tensor that differs.
    """
    frozen = frozen_of(model)
    try:
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            names = set(tensors.keys())
            for entry in entries_of(model):
                _load(entry, tensors, names, file)
            for name in sorted(names & frozen.keys()):
                if frozen[name].is_floating_point() and not torch.equal(tensors.get_tensor(name), frozen[name]):
                    raise _misfit(file, f"{name} is frozen, and differs; let model() load it")
            known = model.state_dict().keys() | {entry.name for entry in entries_of(model)}
            if unknown := sorted(names - known):
                raise _misfit(file, f"the task's model has no {unknown[0]}")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"initial_model: {file} cannot be read ({error}); give a safetensors file") from error


def _load(entry: StateEntry, tensors: safe_open, names: set[str], file: Path) -> None:
    shape = tuple(entry.tensor.shape)
    whole = entry.name.removesuffix(LOG_SUFFIX) if entry.eps is not None else entry.name
    if not {entry.name, whole} & names:
        raise _misfit(file, f"it has no {whole}, which is {_shape(shape)} in the task's model")
    found = tensors.get_tensor(entry.name if entry.name in names else whole)  # type: ignore[no-untyped-call]
    if tuple(found.shape) != shape:
        raise _misfit(file, f"{whole} is {_shape(found.shape)} in it, {_shape(shape)} in the task's model")
    held = entry.decoded(found.float().numpy()) if entry.name in names else found
    if not held.isfinite().all() or (entry.eps is not None and (held < 0).any()):
        raise _misfit(file, f"{whole} has values that are not finite, or negative variances")
    entry.tensor.copy_(held)


def _misfit(file: Path, why: str) -> ConfigError:
    return ConfigError(f"initial_model: {file} does not fit: {why}; give a model of the same task")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single value"
