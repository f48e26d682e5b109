"""The default loss: cross entropy, for shapes that have one."""

from torch import Tensor
from torch.nn import functional

from fednats.errors import ConfigError
from fednats.learning.outputs import Kind, kind_of, unknown


def default_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of a batch, a scalar.

    Args:
        scores: float logits [n, classes, ...], or with as many values as ``targets``, each the logit of 1 against 0.
        targets: int64[n, ...], or all 0 or 1.

    Raises:
        ConfigError: these shapes and dtypes have no cross entropy.
    """
    kind = kind_of(scores.detach(), targets) if isinstance(scores, Tensor) else Kind.OTHER
    match kind:
        case Kind.CLASSES | Kind.SEGMENTATION:
            return functional.cross_entropy(scores, targets.reshape(len(scores), *scores.shape[2:]).long())
        case Kind.BINARY | Kind.LABELS | Kind.MASK:
            return functional.binary_cross_entropy_with_logits(scores, targets.reshape(scores.shape).to(scores.dtype))
        case Kind.REGRESSION | Kind.OTHER:
            raise ConfigError(
                f"{unknown(scores, targets)}; the default loss is cross entropy, and needs logits [n, classes] with int64"
                " targets [n], or targets 0 or 1 of the size of the outputs; write the task's loss()"
            )
