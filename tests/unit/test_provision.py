"""Kits: each with what its holder may have, and kept over reruns."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fednats.config import AggregatorSettings, CoordinatorSettings, DeltaSettings, SiteSettings, load, parse
from fednats.crypto.public import KEY_ID_BYTES, PublicKey
from fednats.delta import scheme
from fednats.errors import ConfigError
from fednats.learning.code_files import read_code
from fednats.privacy.policy import Budget, Policy, read_policy
from fednats.provision import nkey
from fednats.provision.kits import provision, rotate
from fednats.provision.new_key import new_key, new_pair
from fednats.provision.plan import Kits, Plan, RegionPlan
from fednats.services.daemon.keys import read_key
from fednats.subjects import HUB
from fednats.testbed.federation import FederationSettings

NORTH, SOUTH = RegionPlan("north", ("a", "b")), RegionPlan("south", ("c", "d"))


def plan(*regions: RegionPlan, cipher: str = "none", **changes: Any) -> Plan:
    run = {"name": "ward", "delta": {"cipher": cipher}}
    raw = {"run": run, "regions": regions or (NORTH, SOUTH), "task": {"path": "breast-cancer"}, **changes}
    return parse(raw, Plan, source="test")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def holders(folder: Path, secret: bytes) -> set[str]:
    return {Path(name).parts[0] for name, content in contents(folder).items() if secret in content}


def signers(folder: Path, kit: str = "site-a") -> dict[str, Any]:
    return tomllib.loads((folder / kit / "signers.toml").read_text())


def test_each_kit_has_what_its_holder_may_have(tmp_path: Path) -> None:
    provision(plan(cipher="bfv"), tmp_path)
    kits = Kits(tmp_path)
    everybody = {"coordinator", "region-north", "region-south", "site-a", "site-b", "site-c", "site-d"}
    assert {path.name for path in tmp_path.iterdir()} == everybody | {"authority", "hub"}
    assert holders(tmp_path, (kits.coordinator / "epoch-1.secret").read_bytes()[:4096]) == {"coordinator"}
    model_key = (kits.authority / "model-1.key").read_bytes()
    assert len(model_key) == 32
    sites = {f"site-{name}" for name in "abcd"}
    assert holders(tmp_path, model_key) == {"authority", "coordinator"} | sites
    assert holders(tmp_path, (kits.authority / "ca.key").read_bytes()) == {"authority"}
    assert holders(tmp_path, (kits.authority / "epoch-1.public").read_bytes()) == everybody | {"authority"}
    seeds = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.nk")}
    regions = {f"region-{r}/{role}.{r}.nk" for r in ("north", "south") for role in ("aggregator", "uplink", "observer")}
    assert seeds == regions | {"coordinator/coordinator.hub.nk", "hub/observer.hub.nk"} | {
        f"site-{name}/site.{name}.nk" for name in "abcd"
    }
    for path in tmp_path.rglob("*.nk"):
        assert holders(tmp_path, path.read_bytes()) == {path.parent.name}


def test_private_files_are_private(tmp_path: Path) -> None:
    provision(plan(cipher="bfv"), tmp_path / "kits")
    kits = tmp_path / "kits"
    assert all(path.stat().st_mode & 0o777 == 0o700 for path in kits.iterdir())
    private = [
        p for p in kits.rglob("*") if p.suffix in {".nk", ".key", ".secret"} or p.name in {"link.conf", "accounts.conf"}
    ]
    assert len(private) > 20
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in private)


def test_a_folder_that_was_there_keeps_its_mode(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o755)
    new_key("site.a", shared)
    assert shared.stat().st_mode & 0o777 == 0o755
    assert (shared / "site.a.nk").stat().st_mode & 0o777 == 0o600


def test_the_settings_work_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "task.py").write_text("class T: ...\n")
    task = {"path": f"{tmp_path / 'task.py'}:T", "options": {"csv": "/data/a.csv"}}
    provision(plan(cipher="bfv", task=task), tmp_path / "kits")
    kits = Kits(tmp_path / "kits")
    monkeypatch.chdir("/")
    site = load(kits.site("a") / "site.toml", SiteSettings, {})
    assert site.bus.nkey_seed_file == kits.site("a") / "site.a.nk"
    assert site.bus.ca_file == kits.site("a") / "ca.pem"
    assert site.state_dir == kits.site("a") / "state"
    assert site.task.path == f"{kits.site('a') / 'task.py'}:T"
    assert site.task.options == {"csv": "/data/a.csv"}
    coordinator = load(kits.coordinator / "coordinator.toml", CoordinatorSettings, {})
    assert coordinator.settings.name == "ward"
    aggregator = load(kits.region("north") / "aggregator.toml", AggregatorSettings, {})
    assert aggregator.sites == ("a", "b")
    delta = coordinator.settings.delta
    key = read_key(site.public_key_file, "public_key_file")
    assert key is not None
    assert PublicKey(key, scheme.bfv(delta).parameters).key_id == read_key(coordinator.secret_key_file, "")[:16].hex()  # type: ignore[index]


def test_a_task_s_folder_is_in_the_kits_as_it_is_and_hashes_alike(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/model.py", "codes.txt", "old.py", ".hidden"):
        (folder / name).write_text(f"# {name}\n")
    of_folder = plan(task={"path": f"{folder}:T"})
    provision(of_folder, tmp_path / "kits")
    kit = tmp_path / "kits" / "site-a"
    assert load(kit / "site.toml", SiteSettings, {}).task.path == f"{kit / 'mine'}:T"
    assert read_code(kit / "mine").sha256 == read_code(folder).sha256
    assert not (kit / "mine" / ".hidden").exists()
    assert "| `mine` | the task: the code that is trained with |" in (kit / "README.md").read_text()
    (folder / "old.py").unlink()
    (kit / "mine" / "__pycache__").mkdir()
    (kit / "mine" / "__pycache__" / "old.pyc").write_text("")
    changed = provision(of_folder, tmp_path / "kits")
    assert {path.relative_to(tmp_path / "kits").as_posix() for path in changed} == {
        f"{kit}/mine/old.py" for kit in ("coordinator", "site-a", "site-b", "site-c", "site-d")
    }
    assert read_code(kit / "mine").sha256 == read_code(folder).sha256


def test_a_task_s_wheel_is_in_the_kits(tmp_path: Path) -> None:
    wheel = tmp_path / "mine-1.0-py3-none-any.whl"
    wheel.write_bytes(b"PK")
    provision(plan(task={"path": f"{wheel}:T"}), tmp_path / "kits")
    kit = tmp_path / "kits" / "site-a"
    assert load(kit / "site.toml", SiteSettings, {}).task.path == f"{kit / wheel.name}:T"
    assert (kit / wheel.name).read_bytes() == b"PK"
    assert f"| `{wheel.name}` | the task: the code" in (kit / "README.md").read_text()


def test_a_task_s_folder_has_not_the_name_of_a_daemon_s(tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "__init__.py").write_text("")
    with pytest.raises(ConfigError, match="a kit's folder state holds what a daemon remembers; rename the task's"):
        provision(plan(task={"path": f"{tmp_path / 'state'}:T"}), tmp_path / "kits")


def test_the_roster_is_in_every_service_s_kit(tmp_path: Path) -> None:
    provision(plan(), tmp_path)
    roster = signers(tmp_path)
    assert (roster["run"], roster["epoch"], roster["revoked"]) == ("ward", 1, {})
    assert set(roster["keys"]) == {
        "coordinator.hub",
        "aggregator.north",
        "aggregator.south",
        *(f"site.{s}" for s in "abcd"),
    }
    assert roster["keys"]["site.a"] == nkey.public_key_in(tmp_path / "site-a" / "site.a.nk")
    for kit in ("coordinator", "region-north", "region-south", "site-d"):
        assert signers(tmp_path, kit) == roster


def test_a_second_run_changes_nothing(tmp_path: Path) -> None:
    assert provision(plan(cipher="bfv"), tmp_path)
    before = contents(tmp_path)
    assert provision(plan(cipher="bfv"), tmp_path) == []
    assert contents(tmp_path) == before


def test_kits_that_were_handed_out_get_no_second_key(tmp_path: Path) -> None:
    provision(plan(), tmp_path)
    roster = signers(tmp_path)
    for path in tmp_path.rglob("*.nk"):
        path.unlink()
    provision(plan(), tmp_path)
    assert signers(tmp_path) == roster
    assert list(tmp_path.rglob("*.nk")) == []
    assert "`site.a.nk` is not in this kit" in (tmp_path / "site-a" / "README.md").read_text()


def test_a_site_is_added_only_if_that_is_meant(tmp_path: Path) -> None:
    provision(plan(), tmp_path)
    before = contents(tmp_path)
    more = plan(NORTH, RegionPlan("south", ("c", "d", "e")))
    with pytest.raises(ConfigError, match=r"site.e is new in the federation file; give --add-site e"):
        provision(more, tmp_path)
    with pytest.raises(ConfigError, match=r"--add-site f: it is not in the federation file; there are a, b, c, d, e"):
        provision(more, tmp_path, add_sites=["f"])
    assert contents(tmp_path) == before
    changed = provision(more, tmp_path, add_sites=["e"])
    kept = {name: content for name, content in before.items() if name.endswith((".nk", ".key", ".pem", "link.conf"))}
    assert kept.items() <= contents(tmp_path).items()
    assert {path.parent.name for path in changed if path.name != "signers.toml"} == {
        "authority",
        "region-south",
        "site-e",
    }
    key = nkey.public_key_in(tmp_path / "site-e" / "site.e.nk")
    assert signers(tmp_path)["keys"]["site.e"] == key
    assert key in (tmp_path / "region-south" / "accounts.conf").read_text()
    assert load(tmp_path / "region-south" / "aggregator.toml", AggregatorSettings, {}).sites == ("c", "d", "e")


def test_a_region_is_added_with_its_sites(tmp_path: Path) -> None:
    provision(plan(NORTH), tmp_path)
    with pytest.raises(ConfigError, match=r"aggregator.south is new in the federation file; give --add-region south"):
        provision(plan(), tmp_path)
    provision(plan(), tmp_path, add_regions=["south"], add_sites=["c", "d"])
    assert load(tmp_path / "coordinator" / "coordinator.toml", CoordinatorSettings, {}).regions == ("north", "south")
    assert (
        nkey.public_key_in(tmp_path / "region-south" / "link.conf") in (tmp_path / "hub" / "accounts.conf").read_text()
    )


def test_who_is_revoked_is_in_no_account_and_on_the_list_of_revoked(tmp_path: Path) -> None:
    provision(plan(), tmp_path)
    key = signers(tmp_path)["keys"]["site.b"]
    provision(plan(), tmp_path, revoke=["site.b"])
    for _ in range(2):
        roster = signers(tmp_path)
        assert "site.b" not in roster["keys"]
        assert roster["revoked"] == {"site.b": [key]}
        assert holders(tmp_path, key.encode()) & {"hub"} == set()
        assert key not in (tmp_path / "region-north" / "accounts.conf").read_text()
        assert load(tmp_path / "region-north" / "aggregator.toml", AggregatorSettings, {}).sites == ("a",)
        provision(plan(), tmp_path)  # still in the federation file, and still out
    provision(plan(), tmp_path, add_sites=["b"])
    roster = signers(tmp_path)
    assert roster["keys"]["site.b"] == nkey.public_key_in(tmp_path / "site-b" / "site.b.nk") != key
    assert roster["revoked"] == {"site.b": [key]}
    provision(plan(), tmp_path, revoke=["site.b"])
    assert signers(tmp_path)["revoked"] == {"site.b": [key, roster["keys"]["site.b"]]}


def test_with_a_region_all_its_keys_are_revoked(tmp_path: Path) -> None:
    provision(plan(), tmp_path)
    link = nkey.public_key_in(tmp_path / "region-north" / "link.conf")
    provision(plan(), tmp_path, revoke=["aggregator.north"])
    assert link not in (tmp_path / "hub" / "accounts.conf").read_text()
    assert "uplink" not in (tmp_path / "region-north" / "accounts.conf").read_text().split("deny_imports")[0]
    assert load(tmp_path / "coordinator" / "coordinator.toml", CoordinatorSettings, {}).regions == ("south",)
    assert set(signers(tmp_path)["revoked"]) == {"aggregator.north"}


def test_who_leaves_the_federation_file_must_be_revoked(tmp_path: Path) -> None:
    provision(plan(), tmp_path)
    fewer = plan(NORTH, RegionPlan("south", ("c",)))
    with pytest.raises(ConfigError, match=r"site.d has a key, but is not in the federation file; give --revoke site.d"):
        provision(fewer, tmp_path)
    provision(fewer, tmp_path, revoke=["site.d"])
    assert set(signers(tmp_path)["revoked"]) == {"site.d"}


def test_a_region_hands_in_public_keys_only(tmp_path: Path) -> None:
    own = {name: new_key(name, tmp_path / "own") for name in ("aggregator.north", "uplink.north", "link.north")}
    provision(plan(), tmp_path / "kits", public_keys=own)
    kit = tmp_path / "kits" / "region-north"
    assert not [name for name in ("aggregator.north.nk", "uplink.north.nk", "link.conf") if (kit / name).exists()]
    assert "`link.conf` is not in this kit" in (kit / "README.md").read_text()
    assert signers(tmp_path / "kits")["keys"]["aggregator.north"] == own["aggregator.north"]
    assert own["link.north"] in (tmp_path / "kits" / "hub" / "accounts.conf").read_text()
    provision(plan(), tmp_path / "kits")
    assert signers(tmp_path / "kits")["keys"]["aggregator.north"] == own["aggregator.north"]
    assert (tmp_path / "own" / "link.conf").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="never overwritten"):
        new_key("link.north", tmp_path / "own")
    with pytest.raises(ConfigError, match=r"give ROLE.NAME"):
        new_key("north", tmp_path / "own")


def test_the_coordinator_hands_in_the_public_key_of_the_encryption_only(tmp_path: Path) -> None:
    encrypted, kits = plan(cipher="bfv"), Kits(tmp_path / "kits")
    held, public = new_pair(encrypted.run.delta, 1, tmp_path / "own")
    assert held.stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="contains the secret key"):
        provision(encrypted, kits.root, he_public=held.read_bytes()[KEY_ID_BYTES:])
    provision(encrypted, kits.root, he_public=public.read_bytes())
    assert not list(kits.root.rglob("*.secret"))
    assert "`epoch-1.secret` is not in this kit" in (kits.coordinator / "README.md").read_text()
    site = load(kits.site("a") / "site.toml", SiteSettings, {})
    assert read_key(site.public_key_file, "") == public.read_bytes()
    assert provision(encrypted, kits.root, he_public=public.read_bytes()) == provision(encrypted, kits.root) == []
    held.rename(kits.coordinator / held.name)
    assert provision(encrypted, kits.root) == [kits.coordinator / "README.md"]
    _, second = new_pair(encrypted.run.delta, 2, tmp_path / "own")
    with pytest.raises(ConfigError, match=r"epoch-1\.public is another key; a new one is for a new epoch"):
        provision(encrypted, kits.root, he_public=second.read_bytes())
    with pytest.raises(ConfigError, match=r"keys new-he FEDERATION\.toml --epoch 2"):
        rotate(kits.root)
    rotate(kits.root, he_public=second.read_bytes())
    assert [file.name for file in kits.root.rglob("*.secret")] == ["epoch-1.secret"]
    coordinator = load(kits.coordinator / "coordinator.toml", CoordinatorSettings, {})
    assert coordinator.secret_key_file == kits.coordinator / "epoch-2.secret"
    with pytest.raises(ConfigError, match="never overwritten"):
        new_pair(encrypted.run.delta, 2, tmp_path / "own")


def test_a_public_key_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    encrypted = plan(cipher="bfv")
    other = parse({"value_bits": 4, "max_total_weight": 50}, DeltaSettings, source="test")
    _, public = new_pair(other, 1, tmp_path / "own")
    with pytest.raises(ConfigError, match="generate a new pair for these settings"):
        provision(encrypted, tmp_path / "kits", he_public=public.read_bytes())
    assert not (tmp_path / "kits").exists()
    with pytest.raises(ConfigError, match="not encrypted"):
        provision(plan(), tmp_path / "kits", he_public=public.read_bytes())
    with pytest.raises(ConfigError, match="not encrypted"):
        new_pair(plan().run.delta, 1, tmp_path / "own")


def test_a_run_that_was_ended_between_the_halves_of_a_pair_is_taken_up(tmp_path: Path) -> None:
    encrypted, kits = plan(cipher="bfv"), Kits(tmp_path)
    provision(encrypted, tmp_path)
    before = contents(tmp_path)
    for file in tmp_path.rglob("epoch-1.public"):
        file.unlink()
    provision(encrypted, tmp_path)
    assert contents(tmp_path) == before
    (kits.coordinator / "epoch-1.public").unlink()
    new_pair(encrypted.run.delta, 1, kits.coordinator)
    assert contents(tmp_path)["coordinator/epoch-1.public"] == before["authority/epoch-1.public"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"site.a": "UNSENSE"}, "not the public key of a user"),
        ({"site.z": "U"}, "there is no such user"),
        ({"site.a": "the key of site.b"}, "that is the key of site.b"),
        ({"site.a": "a new one"}, "site.a has the key U.* already"),
        ({"site.a": "a revoked one"}, "that key of site.c was revoked"),
    ],
)
def test_public_keys_that_cannot_be(tmp_path: Path, given: dict[str, str], expected: str) -> None:
    provision(plan(), tmp_path)
    revoked = signers(tmp_path)["keys"]["site.c"]
    provision(plan(), tmp_path, revoke=["site.c"] if "revoked" in str(given) else ["site.d"])
    (tmp_path / "site-a" / "site.a.nk").unlink()
    ((name, key),) = given.items()
    keys = {"the key of site.b": signers(tmp_path)["keys"]["site.b"], "a new one": nkey.public_key(nkey.new_seed())}
    if "revoked" in key:
        provision(plan(), tmp_path, revoke=["site.a"])
        with pytest.raises(ConfigError, match=expected):
            provision(plan(), tmp_path, add_sites=["a"], public_keys={name: revoked})
        return
    with pytest.raises(ConfigError, match=expected):
        provision(plan(), tmp_path, public_keys={name: keys.get(key, key)})


def test_the_coordinator_and_strangers_are_not_revoked(tmp_path: Path) -> None:
    provision(plan(), tmp_path)
    for name in ("coordinator.hub", "site.z", "link.north"):
        with pytest.raises(ConfigError, match=rf"--revoke {name}: that is none of aggregator.north"):
            provision(plan(), tmp_path, revoke=[name])


def test_kits_of_another_run_are_not_touched(tmp_path: Path) -> None:
    provision(plan(), tmp_path)
    with pytest.raises(ConfigError, match="holds the kits of 'ward', not of 'other'"):
        provision(plan(run={"name": "other", "delta": {"cipher": "none"}}), tmp_path)


def test_the_authority_s_key_may_be_away_until_it_is_needed(tmp_path: Path) -> None:
    provision(plan(), tmp_path)
    key = tmp_path / "authority" / "ca.key"
    kept = key.read_bytes()
    key.unlink()
    provision(plan(), tmp_path, revoke=["site.a"])
    (tmp_path / "hub" / "server.pem").unlink()
    with pytest.raises(ConfigError, match=r"ca.key is needed to make a certificate; bring it back"):
        provision(plan(), tmp_path)
    key.write_bytes(kept)
    provision(plan(), tmp_path)


def test_servers_are_where_the_federation_file_says() -> None:
    raw = {
        "name": "ward",
        "task": "breast-cancer",
        "bus": {"host": "nats.example.org"},
        "regions": {"north": {"bus": {"host": "north.example.org", "upstream": "tls://10.0.0.5:7000"}}, "south": {}},
        "sites": {name: {"region": "north" if name in "ab" else "south"} for name in "abcd"},
    }
    made = parse(raw, FederationSettings, source="test").plan()
    hub, north, south = (made.server(node) for node in (HUB, "north", "south"))
    assert (hub.url, hub.leaf_url, hub.listens_on) == (
        "tls://nats.example.org:4222",
        "tls://nats.example.org:7422",
        "0.0.0.0",  # noqa: S104 - what is asserted
    )
    assert hub.hosts == ("nats.example.org", "10.0.0.5", "localhost", "127.0.0.1")
    assert (north.url, made.upstream("north")) == ("tls://north.example.org:4222", "tls://10.0.0.5:7000")
    assert (south.url, south.monitor_url, south.listens_on) == (
        "tls://127.0.0.1:4224",
        "http://127.0.0.1:8224",
        "127.0.0.1",
    )
    assert made.upstream("south") == "tls://nats.example.org:7422"


def test_a_rotation_makes_a_pair_and_keeps_the_one_before(tmp_path: Path) -> None:
    provision(plan(cipher="bfv"), tmp_path)
    before = contents(tmp_path)
    rotate(tmp_path)
    assert signers(tmp_path)["epoch"] == 2
    kept = {name: before[name] for name in before if name.endswith((".secret", ".public", ".key"))}
    assert kept.items() <= contents(tmp_path).items()
    kits = Kits(tmp_path)
    secret = (kits.coordinator / "epoch-2.secret").read_bytes()
    assert holders(tmp_path, secret[:4096]) == {"coordinator"}
    coordinator = load(kits.coordinator / "coordinator.toml", CoordinatorSettings, {})
    assert coordinator.secret_key_file == kits.coordinator / "epoch-2.secret"
    assert coordinator.older_secret_key_file == kits.coordinator / "epoch-1.secret"
    assert coordinator.model_key_file == kits.coordinator / "model-2.key"
    assert coordinator.older_model_key_file == kits.coordinator / "model-1.key"
    for kit, name, cls in (
        (kits.site("a"), "site", SiteSettings),
        (kits.region("north"), "aggregator", AggregatorSettings),
    ):
        settings: Any = load(kit / f"{name}.toml", cls, {})
        assert (settings.public_key_file, settings.older_public_key_file) == (
            kit / "epoch-2.public",
            kit / "epoch-1.public",
        )
    hospital = load(kits.site("a") / "site.toml", SiteSettings, {})
    assert hospital.model_key_file.read_bytes() == coordinator.model_key_file.read_bytes()
    assert hospital.older_model_key_file == kits.site("a") / "model-1.key"
    rotate(tmp_path)
    coordinator = load(kits.coordinator / "coordinator.toml", CoordinatorSettings, {})
    assert coordinator.older_secret_key_file == kits.coordinator / "epoch-2.secret"
    assert provision(plan(cipher="bfv"), tmp_path) == []


def test_who_was_revoked_gets_no_key_of_the_next_epoch(tmp_path: Path) -> None:
    provision(plan(), tmp_path)
    provision(plan(), tmp_path, revoke=["site.b"])
    rotate(tmp_path)
    secret = (tmp_path / "authority" / "model-2.key").read_bytes()
    assert holders(tmp_path, secret) == {"authority", "coordinator", "site-a", "site-c", "site-d"}


def test_the_first_policy_of_a_kit_is_the_federation_file_s_and_then_the_hospital_s(tmp_path: Path) -> None:
    lines = {"a": {"min_samples": 50, "budget": {"max_epsilon": 3.0}}}
    provision(plan(cipher="bfv", site_policies=lines), tmp_path)
    file = Kits(tmp_path).site("a") / "policy.toml"
    with pytest.raises(ConfigError, match="name its file, privacy_account"):  # which only the hospital can
        read_policy(file)
    account = tmp_path / "var" / "privacy.sqlite"
    file.write_text(f'privacy_account = "{account}"\n{file.read_text()}')
    assert read_policy(file) == Policy(min_samples=50, privacy_account=account, budget=Budget(max_epsilon=3.0))
    assert read_policy(Kits(tmp_path).site("b") / "policy.toml") == Policy()
    file.write_text("min_sites = 5")
    assert provision(plan(cipher="bfv", site_policies=lines), tmp_path) == []
    assert read_policy(file) == Policy(min_sites=5)


def test_rotation_needs_kits(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `fednats provision` first"):
        rotate(tmp_path)
    provision(plan(), tmp_path)
    (tmp_path / "authority" / "registry.toml").unlink()
    with pytest.raises(ConfigError, match=r"registry\.toml is not there"):
        rotate(tmp_path)


def test_a_store_that_its_streams_do_not_fit_into_is_refused_with_what_they_need(tmp_path: Path) -> None:
    raw = {"run": {"name": "r"}, "regions": ({"name": "north", "sites": ("a", "b"), "bus": {"max_store": "20GB"}},)}
    with pytest.raises(ConfigError, match=r'\[regions.north.bus\] max_store = "20GB": .* take 49.7 GiB .* give 50GB'):
        provision(parse({**raw, "task": {"path": "heart"}}, Plan, source="test"), tmp_path / "kits")
    assert not (tmp_path / "kits").exists()


def test_every_service_keeps_its_web_port_and_no_two_of_a_federation_have_one(tmp_path: Path) -> None:
    def ports() -> dict[str, int]:
        files: dict[str, type[CoordinatorSettings | AggregatorSettings | SiteSettings]]
        files = {"coordinator": CoordinatorSettings, "aggregator": AggregatorSettings, "site": SiteSettings}
        return {
            path.parent.name: load(path, cls, {}).web.port
            for role, cls in files.items()
            for path in tmp_path.glob(f"*/{role}.toml")
        }

    provision(plan(), tmp_path)
    before = ports()
    assert len(set(before.values())) == len(before) == 7
    more = replace(NORTH, sites=("0", *NORTH.sites))
    provision(plan(more, SOUTH), tmp_path, add_sites=("0",))
    rotate(tmp_path)
    after = ports()
    assert {name: after[name] for name in before} == before
    assert len(set(after.values())) == 8
    for name, port in after.items():
        readme = (tmp_path / name / "README.md").read_text()
        assert f"http://127.0.0.1:{port}/readyz" in readme
        assert "{" not in readme
