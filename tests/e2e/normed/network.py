from importlib.resources import files

from torch import nn


def network() -> nn.Module:
    n_inputs = int((files(__package__) / "columns.txt").read_text())
    return nn.Sequential(nn.Linear(n_inputs, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
