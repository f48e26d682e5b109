"""The steps of DP-SGD: clip each record's gradient, add noise to their sum, draw batches at random.

Abadi et al. 2016 (arXiv:1607.00133), algorithm 1, with opacus's per-record gradients. A site's worker imports this
module only when a run asks for it, because opacus is large.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from operator import itemgetter

import torch
from opacus.grad_sample import GradSampleModule
from opacus.optimizers import DPOptimizer
from opacus.optimizers.optimizer import _check_processed_flag, _mark_as_processed
from opacus.validators import ModuleValidator
from torch import Tensor, nn, optim
from torch.nn.modules.batchnorm import _NormBase

from fednats.config import RecordPrivacySettings
from fednats.errors import LocalDataError, TaskError
from fednats.learning.batches import Batches, loss_of
from fednats.learning.entries import gathering
from fednats.learning.inputs import each
from fednats.learning.task import Task
from fednats.privacy.randomness import Randomness

CHECKED_CASES = 8
"""Cases on which the task's loss is compared with the mean of single-case losses."""

REMEDIES: Mapping[str, str] = {
    "BatchNorm": "nn.GroupNorm, or freeze it (requires_grad=False for its weight and bias)",
    "InstanceNorm": "nn.GroupNorm, or track_running_stats=False",
    "LSTM": "opacus.layers.DPLSTM",
    "GRU": "opacus.layers.DPGRU",
    "MultiheadAttention": "opacus.layers.DPMultiheadAttention",
}
"""Replacements for unsuitable layers, by a part of the layer's class name."""


def refuse_unsuitable(model: nn.Module) -> None:
    """Refuse a model in which one record's gradient depends on the others.

    Raises:
        TaskError: names each such layer and a replacement.
    """
    kinds = tuple(ModuleValidator.VALIDATORS)
    gathers = {id(layer) for layer in gathering(model)}
    wrong = []
    for name, layer in model.named_modules():
        if isinstance(layer, _NormBase) and id(layer) not in gathers and not _trains(layer):
            continue  # frozen: it treats every record the same
        kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
        if kind is not None and ModuleValidator.VALIDATORS[kind](layer):
            remedy = next((text for part, text in REMEDIES.items() if part in kind.__name__), "another layer")
            wrong.append(f"{name or 'the model'} ({type(layer).__name__}): use {remedy}")
    if wrong:
        raise TaskError(
            "the model cannot be trained with differential privacy, a record must not act on another's gradient: "
            + "; ".join(wrong)
        )


def _trains(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters(recurse=False))


def check_loss(task: Task, model: nn.Module, data: Batches) -> None:
    """Refuse a loss that is not the mean of the cases' single losses over the batch.

    Only with such a mean is a record's gradient its own. A sum fails, and so do class weights divided by their sum over
    the batch.

    Raises:
        TaskError: with the loss found and the loss expected.
    """
    model.eval()
    inputs, targets = data.of(range(min(len(data), CHECKED_CASES)))
    with torch.no_grad():
        together = float(loss_of(task, model, inputs, targets))
        cases = [slice(index, index + 1) for index in range(len(targets))]
        alone = [float(loss_of(task, model, each(inputs, itemgetter(case)), targets[case])) for case in cases]
    mean = sum(alone) / len(alone)
    if not math.isclose(together, mean, rel_tol=1e-3, abs_tol=1e-5):
        raise TaskError(
            f"the loss of {len(alone)} cases together is {together:.6g}, the mean of their own losses {mean:.6g}; with"
            " differential privacy loss() must be that mean: no sum, no weights divided by their sum over the batch"
        )


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]  # opacus is untyped
    """opacus's optimizer, with noise from `Randomness` instead of a predictable generator."""

    def __init__(
        self, optimizer: optim.Optimizer, settings: RecordPrivacySettings, batch_size: float, randomness: Randomness
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=settings.noise_multiplier,
            max_grad_norm=settings.max_grad_norm,
            expected_batch_size=batch_size,
        )
        self._randomness = randomness

    def add_noise(self) -> None:
        """Set ``p.grad`` to the sum of clipped gradients plus noise."""
        deviation = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            _check_processed_flag(parameter.summed_grad)
            noise = torch.from_numpy(self._randomness.normal(parameter.numel())) * deviation
            parameter.grad = parameter.summed_grad.view_as(parameter) + noise.view_as(parameter).to(parameter)
            _mark_as_processed(parameter.summed_grad)


class PrivateSteps:
    """Takes steps on one model. `close` restores the model: no hooks, and in-place layers as before."""

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        data: Batches,
        optimizer: optim.Optimizer,
        settings: RecordPrivacySettings,
        expected_batch_size: float,
        randomness: Randomness,
    ) -> None:
        self._task = task
        self._cases = data
        self._settings = settings
        self._in_place = [layer for layer in model.modules() if getattr(layer, "inplace", False) is True]
        for layer in self._in_place:  # opacus's hooks cannot see values that such layers overwrite
            layer.inplace = False  # type: ignore[assignment]  # torch types unknown attributes as modules
        self._module = GradSampleModule(model, strict=False)  # `refuse_unsuitable` has checked the layers
        self._optimizer = PrivateOptimizer(optimizer, settings, expected_batch_size, randomness)

    def close(self) -> None:
        """Remove the hooks from the model, and everything they stored."""
        self._optimizer.zero_grad(set_to_none=True)
        for parameter in self._optimizer.params:
            del parameter.summed_grad
        model = self._module.to_standard_module()
        for layer in model.modules():  # left by a batch that failed between forward and backward
            for left in {"activations", "max_batch_len"} & vars(layer).keys():
                delattr(layer, left)
        for parameter in model.parameters():
            vars(parameter).pop("_current_grad_sample", None)
        for layer in self._in_place:
            layer.inplace = True  # type: ignore[assignment]  # as above

    def step(self, batch: Sequence[int]) -> float:
        """Take one step on the cases ``batch``; return the sum of their losses.

        A batch larger than ``physical_batch_size`` passes through the model in parts.

        Raises:
            LocalDataError: a loss is not finite.
        """
        size = self._settings.physical_batch_size
        parts = [batch[start : start + size] for start in range(0, len(batch), size)] or [()]
        total = 0.0
        for position, part in enumerate(parts):
            self._optimizer.signal_skip_step(do_skip=position < len(parts) - 1)
            total += self._gradients(part)
            self._optimizer.step()
            self._optimizer.zero_grad()
        return total

    def _gradients(self, part: Sequence[int]) -> float:
        """Compute the gradient of each case of ``part`` into ``grad_sample``; return the sum of their losses."""
        if not part:
            for parameter in self._optimizer.params:
                parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            return 0.0
        inputs, targets = self._cases.of(part)
        loss = loss_of(self._task, self._module, inputs, targets)
        value = loss.item()
        if not math.isfinite(value):
            raise LocalDataError(f"loss is {value}; lower the learning rate?", public="the loss is not finite")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing")  # inputs need no gradient
            warnings.filterwarnings("ignore", message="grad and param do not obey")  # channels last: affects only speed
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        for name, parameter in self._module.named_parameters():
            sample = getattr(parameter, "grad_sample", None)
            if parameter.requires_grad and (not isinstance(sample, Tensor) or len(sample) != len(part)):
                raise TaskError(
                    f"{name} has no gradient for each of {len(part)} cases; with differential privacy every layer must see"
                    " the cases as the first dimension, each once in a pass, and none folded into several"
                )
        return value * len(part)
