"""The whole way of the numbers: fresh updates of equal participation give FedAvg, to the quantisation step."""

from typing import Any

import numpy as np
import pytest

from fednats.codec import grid as grids
from fednats.codec.layout import Layout
from fednats.config import AggregationSettings, DeltaSettings
from fednats.crypto import secret
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.encode import encoder
from fednats.delta.sum import summer
from fednats.messages import ParameterSpec, Update
from fednats.protocol.admission import Roster
from fednats.protocol.collector import Collector
from fednats.protocol.events import Combine, ContributionArrived
from fednats.protocol.weights import apportion
from tests.makers import announcement, update

N_SAMPLES = {"a": 1000, "b": 317, "c": 42, "d": 2048}


@pytest.mark.parametrize("settings", [{"cipher": "bfv"}, {"cipher": "bfv", "value_bits": 4}, {"cipher": "none"}])
def test_fresh_updates_give_the_mean_weighted_by_samples(settings: dict[str, Any]) -> None:
    delta_settings = DeltaSettings.model_validate(settings)
    keys = secret.generate(scheme.bfv(delta_settings).parameters) if delta_settings.cipher == "bfv" else (None, None)
    secret_key, public_key = keys
    layout = Layout((ParameterSpec(name="weight", shape=(50, 40)), ParameterSpec(name="bias", shape=(40,))))
    rng = np.random.default_rng(3)
    deltas = {site: rng.normal(scale=0.02, size=layout.n_parameters).astype(np.float32) for site in N_SAMPLES}
    qmax = scheme.qmax(delta_settings)
    grid = grids.initial(layout, deltas["a"] * 8, qmax)
    steps = layout.steps(grid.steps, 0, layout.n_parameters)
    encode = encoder(delta_settings, public_key)
    nothing = np.zeros(layout.n_parameters, np.float32)
    chunks = {}
    for site, delta in deltas.items():
        (chunk,) = encode.encode(delta, nothing, layout, grid, rng)
        assert chunk.n_saturated == 0
        chunks[site] = chunk.data

    machine = Collector(Roster("r", "north", frozenset(N_SAMPLES), frozenset(), N_SAMPLES), lambda _: "all")
    machine.handle(announcement(settings=AggregationSettings(goal="all")))
    commands = [
        command
        for site, n_samples in N_SAMPLES.items()
        for command in machine.handle(ContributionArrived(head=update(site, n_samples=n_samples)))
    ]
    (combine,) = (command for command in commands if isinstance(command, Combine))
    parts = combine.combination.parts
    weights = apportion([part.mass for part in parts], [1] * len(parts), delta_settings.max_total_weight)
    sites = [part.head.site for part in parts if isinstance(part.head, Update)]
    summed = summer(delta_settings, public_key).weighted_sum([chunks[site] for site in sites], weights, sum(weights))
    mean = decoder(delta_settings, secret_key).mean([summed], sum(weights), layout, grid)

    total = sum(N_SAMPLES.values())
    fedavg = sum(delta * (N_SAMPLES[site] / total) for site, delta in deltas.items())
    largest_value = max(np.abs(delta / steps).max() for delta in deltas.values())
    share_error = sum(
        abs(weight / sum(weights) - N_SAMPLES[site] / total) for site, weight in zip(sites, weights, strict=True)
    )
    error = np.abs(mean - fedavg) / steps
    assert error.max() < 1 + share_error * largest_value
    assert error.max() < 1.5
    assert error.mean() < 0.5
