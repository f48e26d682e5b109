"""One malicious hospital of five, in virtual time with the daemons' own machines.

``python -m tests.poisoning`` prints the tables of ``docs/poisoning.md``; ``tests/unit/test_poisoning.py`` holds what they say.
"""

import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from unittest.mock import patch

import numpy as np
import torch
from sklearn.datasets import load_digits

from fednats.config import TrainingSettings
from fednats.errors import Reason
from fednats.learning.flat import initial_vector, parameters_of, read_vector, write_vector
from fednats.learning.trainer import Trainer
from fednats.messages import MAX_COUNT, MIN_MASS, Aggregate
from fednats.protocol import claims
from fednats.protocol.events import ContributionArrived, Event
from fednats.testbed.virtual_time import VirtualFederation, VirtualSite
from fednats.testbed.virtual_world import Weights
from tests.unit.test_virtual_time import Digits, run_settings

TRAINING = TrainingSettings(local_steps=5, batch_size=32, learning_rate=0.5, momentum=0.0)

Attack = Callable[[Weights, int], Weights]
ATTACKS: dict[str, Attack] = {
    "none": lambda delta, _seed: delta,
    "flipped": lambda delta, _seed: -delta,
    "flipped x 4": lambda delta, _seed: -4 * delta,
    "flipped x 10": lambda delta, _seed: -10 * delta,
    "x 100": lambda delta, _seed: -100 * delta,
    "noise": lambda delta, seed: np.random.default_rng(seed).normal(scale=5, size=delta.size).astype(np.float32),
}


Claim = Callable[[int, int], int]
"""What a hospital says it has, given its cases and how many passes it has lied before."""

CLAIMS: dict[str, Claim] = {
    "its cases": lambda cases, _n: cases,
    "1e12": lambda _cases, _n: 10**12,
    "20 times": lambda cases, _n: 20 * cases,
    "1e12 once": lambda cases, n: cases if n else 10**12,
    "1e12 every tenth time": lambda cases, n: cases if n % 10 else 10**12,
    "more each time": lambda cases, n: min(int(cases * 1.3**n), MAX_COUNT),
    "one": lambda _cases, _n: 1,
}


class Hospital:
    """Honest for its first ``honest`` passes, then it sends what attack and claim make of its delta and its cases."""

    def __init__(self, task: Digits, attack: Attack, honest: int, claim: Claim = CLAIMS["its cases"]) -> None:
        self._model = task.model()
        self._trainer = Trainer(task, self._model)
        self.n_samples = self._trainer.n_samples
        self._attack = attack
        self._claim = claim
        self._honest = honest

    def learn(self, weights: Weights, seed: int) -> Weights:
        self._trainer.train(weights, TRAINING, seed)
        delta = read_vector(self._model) - weights
        self._honest -= 1
        if self._honest >= 0:
            return delta
        self.n_samples = self._claim(self._trainer.n_samples, -self._honest - 1)
        return self._attack(delta, seed)


@cache
def tasks() -> tuple[list[Digits], Digits]:
    """Share the digits out evenly."""
    n = len(load_digits().target)
    rng = np.random.default_rng(0)
    is_test = rng.random(n) < 0.4
    rows = rng.permutation(np.flatnonzero(~is_test))
    return [Digits(part.tolist()) for part in np.array_split(rows, 5)], Digits(np.flatnonzero(is_test).tolist())


def federation(
    attack: str,
    *,
    honest: int,
    n_regions: int,
    claim: str = "its cases",
    quarantine: bool = True,
    in_north: int = 3,
    registered: bool = False,
    **aggregation: object,
) -> VirtualFederation:
    """Five hospitals, the last one malicious; without it four where ``attack`` is "absent"."""
    hospitals, _ = tasks()
    sites = {
        f"hospital-{number}": VirtualSite(
            region="north" if number < in_north or n_regions == 1 else "south",
            learner=Hospital(task, ATTACKS[attack], honest, CLAIMS[claim])
            if number == 4
            else Hospital(task, ATTACKS["none"], honest),
            train_s=1.0 + 0.03 * number,
            delay_s=0.05,
            registered=len(task.labels) if registered else None,
        )
        for number, task in enumerate(hospitals[:4] if attack == "absent" else hospitals)
    }
    settings = run_settings(
        training=TRAINING,
        server={"learning_rate": 0.3 if n_regions > 1 else 1.0},
        aggregation=aggregation,
        defence={"quarantine": quarantine},
    )
    parameters = parameters_of(hospitals[0].model())
    return VirtualFederation(settings, sites, parameters, initial_vector(hospitals[0], 0), 0.15)


def learned(run: VirtualFederation, until_s: float = 45.0) -> float:
    """Return the accuracy on test digits: mean of the last ten versions, for a single one is one step from another."""
    run.run(until_s)
    return statistics.mean(_accuracy(version.weights) for version in run.versions[-10:])


def _accuracy(weights: Weights) -> float:
    _, test = tasks()
    model = test.model()
    write_vector(model, weights)
    with torch.inference_mode():
        right = model(test.inputs).argmax(1) == test.labels
    return float(right.float().mean())


def encrypted(attack: str, *, honest: int, quarantine: bool) -> tuple[float, int]:
    """Two regions, as with encryption: only the norms of sums can be seen. Return accuracy, and sums left out."""
    run = federation(attack, honest=honest, n_regions=2, quarantine=quarantine)
    found = learned(run)
    assert {refusal.reason for refusal in run.refused} <= {Reason.OUTLIER}
    return found, len(run.refused)


def robust(attack: str, rule: str, claim: str = "its cases", *, registered: bool = False) -> float:
    """One region that sees its updates, and an attack from the beginning."""
    run = federation(
        attack, honest=0, n_regions=1, claim=claim, quarantine=False, registered=registered, goal=5, robust=rule
    )
    found = learned(run, 30.0)
    assert run.refused == []
    return found


# --- claims of mass -----------------------------------------------------------------------------------------------------

LIE_FROM = 3
"""Passes, or sums, before the lie: a model that has hardly learned shows whether it goes on."""

Lie = Callable[[Aggregate, int], dict[str, float]]
REGION_LIES: dict[str, Lie] = {
    "1e15": lambda _sum, _n: {"mass": 1e15},
    "20 times": lambda head, _n: {"mass": 20 * head.mass},
    "1e15 once": lambda head, n: {"mass": head.mass if n else 1e15},
    "1e15 every tenth time": lambda head, n: {"mass": head.mass if n % 10 else 1e15},
    "next to nothing": lambda _sum, _n: {"mass": MIN_MASS},
}


def lying(claim: str, attack: str = "none", *, registered: bool = False) -> VirtualFederation:
    """Return the federation with a hospital that says what is not so of its cases, from its fourth pass on."""
    return federation(attack, honest=LIE_FROM, n_regions=2, in_north=2, claim=claim, registered=registered)


def lying_region(lie: Lie) -> VirtualFederation:
    """Return the federation with a region that says of its sums what is not so, from its fourth on."""
    run = federation("none", honest=0, n_regions=2, in_north=2)
    south = run._regions["south"]
    send, n_sent = south._send, count(-LIE_FROM)

    def send_lie(event: Event) -> None:
        assert isinstance(event, ContributionArrived)
        head = event.head
        assert isinstance(head, Aggregate)
        if (n := next(n_sent)) >= 0:
            head = head.model_copy(update=lie(head, n))
        send(ContributionArrived(head=head))

    south._send = send_lie
    return run


@cache
def without_the_liar() -> float:
    """Return what the same federation learns without the liar's hospital."""
    return learned(federation("absent", honest=0, n_regions=2, in_north=2))


@contextmanager
def all_believed() -> Iterator[None]:
    """Believe every claim, for comparison."""
    with patch.object(claims, "SITE_LIMIT", float("inf")), patch.object(claims, "GROWTH", float("inf")):
        yield


# --- the tables of the documentation ----------------------------------------------------------------------------------


def claims_table() -> Iterator[str]:
    """Lies about cases and mass."""
    yield f"without the liar's hospital: {without_the_liar():.3f}"
    for claim in CLAIMS:
        with all_believed():
            row = [learned(lying(claim)), learned(lying(claim, "flipped"))]
        for attack in ("none", "flipped"):
            row += [learned(lying(claim, attack)), learned(lying(claim, attack, registered=True))]
        yield _line(claim, *(f"{value:.3f}" for value in row))
    for name, lie in REGION_LIES.items():
        with all_believed():
            before = learned(lying_region(lie))
        yield _line(f"its region: {name}", f"{before:.3f}", "", f"{learned(lying_region(lie)):.3f}")


def limits_table() -> Iterator[str]:
    """What a flipped delta gains by a claim of 10^12 cases, by how far a site that is not registered is believed."""
    for limit in (1.0, 1.5, 2.0, 3.0, 4.0):
        with patch.object(claims, "SITE_LIMIT", limit):
            yield _line(f"{limit:g}", f"{learned(lying('1e12', 'flipped')):.3f}")


def norms_table() -> Iterator[str]:
    """What the check of norms stops."""
    for attack in ATTACKS:
        cells = []
        for honest in (20, 0):
            (checked, n_left_out), (unchecked, _) = (
                encrypted(attack, honest=honest, quarantine=quarantine) for quarantine in (True, False)
            )
            cells += [f"{checked:.3f} ({n_left_out})", f"{unchecked:.3f}"]
        yield _line(attack, *cells)


def rules_table() -> Iterator[str]:
    """What robust sums stop."""
    rules = ("none", "median", "trimmed_mean", "norm_bound")
    for attack in ATTACKS:
        yield _line(attack, *(f"{robust(attack, rule):.3f}" for rule in rules))
    for registered in (False, True):
        cells = (f"{robust('flipped', rule, '1e12', registered=registered):.3f}" for rule in rules)
        yield _line(f"flipped, claims 1e12, registered: {registered}", *cells)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


TABLES: dict[str, Callable[[], Iterable[str]]] = {
    "claims": claims_table,
    "limits": limits_table,
    "norms": norms_table,
    "rules": rules_table,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in sys.argv[1:] or TABLES:
        for line in TABLES[name]():
            sys.stdout.write(f"{name}: {line}\n")
            sys.stdout.flush()
