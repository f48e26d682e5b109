"""Measure the cost of encryption: bytes on the wire and processor time per parameter, on one core."""

import time
from collections.abc import Callable
from typing import Literal, TypeVar

import numpy as np

from fednats.codec import grid
from fednats.codec.layout import Layout
from fednats.codec.quantiser import QMAX
from fednats.config import DeltaSettings
from fednats.crypto import secret
from fednats.delta import decode, encode, scheme, sum  # noqa: A004  the package's own noun
from fednats.messages import ParameterSpec

ResultT = TypeVar("ResultT")


def run(n_parameters: int = 1_000_000, n_sites: int = 5) -> list[dict[str, str | int | float]]:
    """Encode, sum and decode updates of ``n_sites``; return a row for 8-bit values and one for 4-bit values.

    Times are processor microseconds per parameter. ``encrypt`` and ``add`` are for one site's update: the first
    includes error feedback, rounding, packing, encryption and the message, the second loading, weighing, adding and a
    share of writing the sum. ``decrypt`` is for one sum.

    Raises:
        RuntimeError: the decrypted mean is not the mean of the deltas.
    """
    return [_row(value_bits, n_parameters, n_sites) for value_bits in (8, 4)]


def total_us_per_parameter(row: dict[str, str | int | float]) -> float:
    """Return processor microseconds per parameter and site, with decryption shared between the sites."""
    return (
        float(row["encrypt_us_per_parameter"])
        + float(row["add_us_per_parameter"])
        + float(row["decrypt_us_per_parameter"]) / int(row["n_sites"])
    )


def _row(value_bits: Literal[4, 8], n_parameters: int, n_sites: int) -> dict[str, str | int | float]:
    settings = DeltaSettings(value_bits=value_bits)
    bfv = scheme.bfv(settings)
    secret_key, public_key = secret.generate(bfv.parameters)
    encoder, summer = encode.encoder(settings, public_key), sum.summer(settings, public_key)
    decoder = decode.decoder(settings, secret_key)
    rng = np.random.default_rng(0)
    layout = Layout([ParameterSpec(name="weight", shape=(n_parameters,))])
    deltas = rng.normal(scale=0.01, size=(n_sites, n_parameters)).astype(np.float32)
    steps = grid.initial(layout, deltas[0] * 8, QMAX[value_bits])
    residual = np.zeros(n_parameters, dtype=np.float32)

    updates, encrypt_us = _timed(
        lambda: [[chunk.data for chunk in encoder.encode(delta, residual, layout, steps, rng)] for delta in deltas]
    )
    weights = [1 + site % 3 for site in range(n_sites)]
    total_weight = int(np.sum(weights))
    chunks, add_us = _timed(
        lambda: [summer.weighted_sum(chunk, weights, total_weight) for chunk in zip(*updates, strict=True)]
    )
    mean, decrypt_us = _timed(lambda: decoder.mean(chunks, total_weight, layout, steps))
    if np.abs(mean - np.average(deltas, axis=0, weights=weights)).max() > steps.steps[0] * 1.01:
        raise RuntimeError("the decrypted mean is not the mean of the deltas")
    return {
        "scheme": f"bfv N={bfv.parameters.poly_modulus_degree} fields={bfv.parameters.n_fields}x{bfv.parameters.field_bits}",
        "value_bits": value_bits,
        "n_parameters": n_parameters,
        "n_sites": n_sites,
        "bytes_per_parameter": float(np.sum([len(chunk) for chunk in updates[0]])) / n_parameters,
        "encrypt_us_per_parameter": encrypt_us / n_parameters / n_sites,
        "add_us_per_parameter": add_us / n_parameters / n_sites,
        "decrypt_us_per_parameter": decrypt_us / n_parameters,
        "margin_bits": bfv.parameters.margin_bits,
    }


def _timed(work: Callable[[], ResultT]) -> tuple[ResultT, float]:
    started = time.process_time()
    result = work()
    return result, (time.process_time() - started) * 1e6
