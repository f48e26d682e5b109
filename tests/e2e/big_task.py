"""A model of any size that trains quickly: one linear map."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from fednats import Examples, Task


class Big(Task):
    """``width`` squared parameters, two cases."""

    def __init__(self, width: int) -> None:
        self.width = width

    def model(self) -> nn.Module:
        return nn.Linear(self.width, self.width, bias=False)

    def train_data(self) -> Examples:
        return self.cases(1)

    def test_data(self) -> Examples:
        return self.cases(2)

    def cases(self, seed: int) -> Examples:
        generator = torch.Generator().manual_seed(seed)
        inputs, targets = (torch.randn(2, self.width, generator=generator) for _ in range(2))
        return TensorDataset(inputs, targets)

    def loss(self, model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(model(inputs), targets)

    def metrics(self, scores: Tensor, targets: Tensor) -> dict[str, float]:
        return {"auc": float(-nn.functional.mse_loss(scores, targets))}
