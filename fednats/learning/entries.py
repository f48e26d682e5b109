"""Which tensors of a model travel, and which stay as ``task.model()`` makes them.

Trainable parameters travel (tied ones once), and so do running statistics of normalisation layers that gather them.
Everything else in the state dict is *frozen*: it is never sent, and stays the same to the bit at every site.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy

from fednats.errors import ConfigError
from fednats.messages import FROZEN_DIGEST_BYTES, MAX_FROZEN_BYTES

LOG_SUFFIX = ".log"
"""Suffix of the name of a running variance that travels as its logarithm."""

SMALLEST_EPS = 1e-12
"""Added to a variance whose layer adds no epsilon of its own."""

MAX_FROZEN = MAX_FROZEN_BYTES // FROZEN_DIGEST_BYTES
"""Largest number of frozen tensors whose digests fit in a manifest."""

Values = NDArray[np.float32]


@dataclass(frozen=True)
class StateEntry:
    """One tensor that travels."""

    name: str
    tensor: Tensor
    statistic: bool = False
    """Whether it is a running mean or variance: no gradient moves it."""
    eps: float | None = None
    """For a running variance: it travels as ``log(variance + eps)``, so no sum of deltas makes it negative."""

    def encoded(self, held: Tensor) -> Values:
        """Encode ``held``, values of the tensor, as values of the flat vector."""
        values = held.detach().to("cpu", torch.float32 if self.eps is None else torch.float64).numpy()
        return values if self.eps is None else np.log(values + self.eps).astype(np.float32)

    def decoded(self, values: Values) -> Tensor:
        """Return the tensor values for ``values`` of the flat vector, rounded to the tensor's dtype."""
        if self.eps is None:
            return torch.tensor(values).to(self.tensor.dtype)
        with np.errstate(over="ignore"):  # the caller refuses an infinite variance
            variance = np.maximum(np.exp(values.astype(np.float64)) - self.eps, 0.0)
        return torch.from_numpy(variance).to(self.tensor.dtype)

    def moved(self, now: Values, start: Values) -> Values:
        """Return the delta from ``start`` to ``now``, both as `encoded`.

        The delta of a variance is its relative change if it fell, and the change of its logarithm if it rose. The mean
        of the hospitals' deltas then vanishes near the mean of their variances. With logarithms alone it would vanish
        at the geometric mean, which one hospital with a constant feature (variance 0) would pull to zero.

        >>> variance = StateEntry("running_var.log", torch.ones(2), statistic=True, eps=0.0)
        >>> variance.moved(np.log(np.float32([0.5, 8])), np.log(np.float32([1, 4]))).round(4)
        array([-0.5   ,  0.6931], dtype=float32)
        """
        delta: Values = now - start
        return delta if self.eps is None else np.where(delta < 0, np.expm1(delta), delta)


def entries_of(model: nn.Module) -> tuple[StateEntry, ...]:
    """Return the tensors that travel, in the order of the state dict.

    Raises:
        ConfigError: the model has a tensor or layer that cannot travel, or nothing to train; the text has the remedy.
    """
    _refuse_unsuitable(model)
    gathers = {id(layer) for layer in gathering(model)}
    found: dict[int, StateEntry] = {}
    for path, layer in model.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in layer.named_parameters(recurse=False):
            if parameter.requires_grad:
                found.setdefault(id(parameter), StateEntry(prefix + name, parameter))
        if isinstance(layer, _NormBase) and id(layer) in gathers:
            mean, variance, eps = layer.running_mean, layer.running_var, max(layer.eps, SMALLEST_EPS)
            if mean is not None and variance is not None:
                found[id(mean)] = StateEntry(f"{prefix}running_mean", mean, statistic=True)
                found[id(variance)] = StateEntry(f"{prefix}running_var{LOG_SUFFIX}", variance, statistic=True, eps=eps)
    if not any(not entry.statistic and entry.tensor.numel() for entry in found.values()):
        raise ConfigError("the model has no trainable parameters; set requires_grad on what is to be trained")
    return tuple(found.values())


def frozen_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the frozen tensors of the state dict, by name."""
    travels = {id(entry.tensor) for entry in entries_of(model)}
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) not in travels}


def frozen_digests(model: nn.Module) -> bytes:
    """Return BLAKE2b-64 of the name, type, shape and bytes of each frozen tensor, in the order of `frozen_of`.

    Raises:
        ConfigError: as `entries_of`, or there are more than `MAX_FROZEN`.
    """
    frozen = frozen_of(model)
    if len(frozen) > MAX_FROZEN:
        raise ConfigError(f"the model has {len(frozen)} frozen tensors, at most {MAX_FROZEN} can be announced")
    return b"".join(_digest(name, tensor) for name, tensor in frozen.items())


def unlike(frozen: list[str], own: bytes, announced: bytes) -> str:
    """Name the first of the ``frozen`` tensors that differs between two results of `frozen_digests`; empty if none."""
    if len(own) != len(announced):
        n_own, n_announced = (len(digests) // FROZEN_DIGEST_BYTES for digests in (own, announced))
        return f"the number of frozen tensors ({n_own}, not {n_announced}) differs"
    for index, name in enumerate(frozen):
        part = slice(index * FROZEN_DIGEST_BYTES, (index + 1) * FROZEN_DIGEST_BYTES)
        if own[part] != announced[part]:
            return f"the frozen tensor {name} differs"
    return ""


def gathering(model: nn.Module) -> list[_NormBase]:
    """Return the normalisation layers whose running statistics follow the data in training.

    Layers whose own parameters are all frozen do not (`set_training`), nor layers that the model keeps in eval mode.
    """
    modes = {layer: layer.training for layer in model.modules()}
    set_training(model)
    found = [
        layer for layer in model.modules() if isinstance(layer, _NormBase) and layer.training and _has_statistics(layer)
    ]
    for layer, mode in modes.items():
        layer.training = mode
    return found


def set_training(model: nn.Module) -> None:
    """Put ``model`` in training mode, except normalisation layers whose own parameters are all frozen.

    Those layers keep normalising with the statistics they came with.
    """
    model.train()
    for layer in model.modules():
        own = list(layer.parameters(recurse=False))
        if isinstance(layer, _NormBase) and own and not any(parameter.requires_grad for parameter in own):
            layer.eval()


def _has_statistics(layer: _NormBase) -> bool:
    return layer.track_running_stats and layer.running_mean is not None


def _digest(name: str, tensor: Tensor) -> bytes:
    values = tensor.detach().to("cpu").contiguous()
    digest = hashlib.blake2b(f"{name} {values.dtype} {tuple(values.shape)} ".encode(), digest_size=FROZEN_DIGEST_BYTES)
    digest.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _refuse_unsuitable(model: nn.Module) -> None:
    wrong = "; ".join((*_unsuitable_layers(model), *_unsuitable_tensors(model)))
    if wrong:
        raise ConfigError(f"the model cannot be federated: {wrong}")


def _unsuitable_layers(model: nn.Module) -> Iterator[str]:
    for path, layer in model.named_modules():
        name = path or "the model"
        if "_orig_mod" in dict(layer.named_children()):
            yield f"{name} is compiled; return it from model() without torch.compile"
        if isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel):
            yield f"{name} is a {type(layer).__name__}; return the model that it wraps (.module)"
        if type(layer).get_extra_state is not nn.Module.get_extra_state:
            yield f"{name} ({type(layer).__name__}) has get_extra_state(), which is no tensor; keep it in a buffer"


def _unsuitable_tensors(model: nn.Module) -> Iterator[str]:
    first: dict[int, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            yield f"{name} has no shape yet; give its layer the input size in place of the Lazy one"
        elif tensor.is_meta:
            yield f'{name} is on the device "meta" and has no values; make the model on the CPU'
        elif tensor.requires_grad and tensor.is_complex():
            yield f"{name} is complex; train its real and imaginary parts, and join them by torch.view_as_complex"
        elif tensor.requires_grad and tensor.numel():
            other = first.setdefault(tensor.data_ptr(), name)
            if other != name:
                yield f"{name} shares its memory with {other}; to tie them, assign the same nn.Parameter to both"
