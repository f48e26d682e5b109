"""Workers that hold the keys of two epochs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fednats.codec.layout import Layout
from fednats.config import (
    AggregationSettings,
    AggregatorSettings,
    BusSettings,
    CoordinatorSettings,
    DeltaSettings,
    parse,
)
from fednats.crypto import sealing, secret
from fednats.crypto.public import key_id
from fednats.delta import scheme
from fednats.delta.encode import encoder
from fednats.errors import ConfigError, Reason, RefusedError
from fednats.services.aggregator.worker import AggregatorWorker
from fednats.services.coordinator.worker import CoordinatorWorker
from fednats.services.daemon.keys import held, read_keys
from fednats.services.site.worker import SiteWorker
from tests.makers import FIRST, aggregate
from tests.participants import seed
from tests.unit.test_privacy_account import manifest, site

BUS = BusSettings(url="tls://127.0.0.1:4222")


@pytest.fixture(scope="module")
def pairs() -> list[tuple[bytes, bytes]]:
    return [secret.generate(scheme.bfv(DeltaSettings()).parameters) for _ in range(3)]


def files(folder: Path, keys: list[bytes]) -> list[Path]:
    made = [folder / f"epoch-{number}" for number in range(len(keys))]
    for path, key in zip(made, keys, strict=True):
        path.write_bytes(key)
    return made


def test_the_announced_key_is_chosen_else_the_newest(pairs: list[tuple[bytes, bytes]], tmp_path: Path) -> None:
    old, new = files(tmp_path, [pairs[0][1], pairs[1][1]])
    keys = read_keys(new, old, "public_key_file")
    assert held(keys, key_id(pairs[0][1])) == pairs[0][1]
    assert held(keys, key_id(pairs[1][1])) == pairs[1][1]
    assert held(keys, key_id(pairs[2][1])) == pairs[1][1]
    assert held((), "none") is None
    assert read_keys(None, None, "public_key_file") == ()
    with pytest.raises(ConfigError, match="older_public_key_file is set, but public_key_file is not"):
        read_keys(None, old, "public_key_file")


def seed_file(folder: Path) -> Path:
    file = folder / "aggregator.north.nk"
    file.write_text(seed())
    return file


def region_worker(tmp_path: Path, **keys: Path) -> AggregatorWorker:
    return AggregatorWorker(
        AggregatorSettings(
            run="r",
            state_dir=tmp_path,
            signers_file=tmp_path / "signers.toml",
            region="north",
            bus=BUS.model_copy(update={"nkey_seed_file": seed_file(tmp_path)}),
            uplink=BUS,
            **keys,
        )
    )


def test_a_region_takes_runs_for_either_of_its_keys(pairs: list[tuple[bytes, bytes]], tmp_path: Path) -> None:
    old, new = files(tmp_path, [pairs[0][1], pairs[1][1]])
    worker = region_worker(tmp_path, public_key_file=new, older_public_key_file=old)
    for _, public in pairs[:2]:
        assert worker.fit(DeltaSettings(), AggregationSettings(), 100, key_id(public)).key_id == key_id(public)
    assert worker.fit(DeltaSettings(), AggregationSettings(), 100, key_id(pairs[2][1])).key_id != key_id(pairs[2][1])


def test_whoever_has_a_key_refuses_a_run_without_encryption(pairs: list[tuple[bytes, bytes]], tmp_path: Path) -> None:
    (key,) = files(tmp_path, [pairs[0][1]])
    plain = DeltaSettings(cipher="none")
    region = region_worker(tmp_path, public_key_file=key)
    with pytest.raises(RefusedError, match="not encrypted, but this region has a public_key_file") as of_region:
        region.fit(plain, AggregationSettings(), 100, "none")
    with pytest.raises(RefusedError, match="not encrypted, but this site has a public_key_file") as of_site:
        SiteWorker(site(tmp_path, public_key_file=key)).check(manifest())
    assert of_region.value.reason is of_site.value.reason is Reason.POLICY


def test_the_coordinator_decrypts_what_either_key_is_for(pairs: list[tuple[bytes, bytes]], tmp_path: Path) -> None:
    old, new = files(tmp_path, [pairs[0][0], pairs[1][0]])
    model_key = tmp_path / "model.key"
    model_key.write_bytes(sealing.generate())
    raw: dict[str, Any] = {
        "run": "r",
        "state_dir": tmp_path / "state",
        "signers_file": tmp_path / "signers.toml",
        "model_key_file": model_key,
        "regions": ["north"],
        "bus": BUS,
        "task": {"path": "breast-cancer"},
        "settings": {"name": "r"},
        "secret_key_file": new,
        "older_secret_key_file": old,
    }
    settings = parse(raw, CoordinatorSettings, source="test")
    worker = CoordinatorWorker(settings, 2**20)
    version = worker.open_run(FIRST, settings.settings, None)
    assert (version.key_id, version.older_key_ids) == (key_id(pairs[1][1]), (key_id(pairs[0][1]),))
    layout, grid = Layout(version.parameters), version.grids[-1]
    delta = np.linspace(-0.01, 0.01, layout.n_parameters, dtype=np.float32)
    means = []
    for _, public in pairs[:2]:
        encode = encoder(DeltaSettings(), public)
        residual = np.zeros(layout.n_parameters, np.float32)
        chunks = list(encode.encode(delta, residual, layout, grid, np.random.default_rng(0)))
        head = aggregate("north", n_sites=1, total_weight=1).model_copy(
            update={"key_id": encode.key_id, "grid_id": grid.grid_id}
        )
        worker.begin()
        for position, chunk in enumerate(chunks):
            worker.decrypt(head, 1.0, position, chunk.data)
        means.append(worker._mean.copy())
    np.testing.assert_array_equal(means[0], means[1])
    assert np.abs(means[0]).max() > 0
    with pytest.raises(RefusedError, match="which is no longer held"):
        worker.decrypt(head.model_copy(update={"key_id": key_id(pairs[2][1])}), 1.0, 0, chunks[0].data)
