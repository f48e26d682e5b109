"""Weights that a run begins with, from a safetensors file."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fednats.errors import ConfigError
from fednats.learning.flat import parameters_of


def load_weights(model: nn.Module, file: Path) -> None:
    """Copy the tensors in ``file`` into ``model``: each that is federated, and none that the model does not have.

    ``file`` is an ``output/model.safetensors``, a checkpoint of a coordinator, or the state dict of such a model.

    Raises:
        ConfigError: it cannot be read, or does not fit; the first tensor that differs is named.
    """
    state = model.state_dict()
    try:
        with safe_open(file, framework="pt") as tensors, torch.no_grad():
            names = set(tensors.keys())
            for spec in parameters_of(model):
                if spec.name not in names:
                    raise _misfit(file, f"it has no {spec.name}, which is {_shape(spec.shape)} in the task's model")
                found = tensors.get_tensor(spec.name)
                if tuple(found.shape) != spec.shape:
                    raise _misfit(
                        file, f"{spec.name} is {_shape(found.shape)} in it, {_shape(spec.shape)} in the task's model"
                    )
                if not found.isfinite().all():
                    raise _misfit(file, f"{spec.name} has values that are not finite")
                state[spec.name].copy_(found)
            if unknown := sorted(names - state.keys()):
                raise _misfit(file, f"the task's model has no {unknown[0]}")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"initial_model: {file} cannot be read ({error}); give a safetensors file") from error


def _misfit(file: Path, why: str) -> ConfigError:
    return ConfigError(f"initial_model: {file} does not fit: {why}; give a model of the same task")


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a single value"
