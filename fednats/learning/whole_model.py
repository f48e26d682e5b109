"""Writes a model as a file that torch reads without fednats: the whole state dict, frozen tensors included."""

from pathlib import Path

from safetensors.torch import save_file

from fednats.codec.layout import Vector
from fednats.learning.flat import initial_model, write_vector
from fednats.learning.task import Task


def write_whole_model(path: Path, task: Task, seed: int, weights: Vector, version: int) -> None:
    """Write the model of a run with ``seed`` at ``weights`` float32[n], for ``task.model().load_state_dict``.

    Tied tensors appear under each of their names. The file appears only when complete; only its owner may read it.

    Raises:
        LocalDataError: ``weights`` does not have the model's size.
        RefusedError: ``not_finite``, as `FlatModel.check`.
    """
    model = initial_model(task, seed)
    write_vector(model, weights)
    tensors = {name: tensor.detach().to("cpu").clone().contiguous() for name, tensor in model.state_dict().items()}
    partial = path.with_name(f"partial-{path.name}")
    partial.touch(mode=0o600)
    save_file(tensors, partial, {"version": str(version), "format": "pt"})
    partial.chmod(0o600)
    partial.rename(path)
