"""Figures of all hospitals' cases pooled, from encrypted counts that only add up: close to the exact ones."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score

from fednats.config import DeltaSettings
from fednats.crypto import secret
from fednats.delta import scheme
from fednats.delta.decode import decoder
from fednats.delta.encode import encoder
from fednats.delta.sum import summer
from fednats.errors import LocalDataError, Reason, RefusedChunkError, RefusedError
from fednats.learning.scores import Counts, n_counts

BFV = DeltaSettings()
SECRET, PUBLIC = secret.generate(scheme.bfv(BFV).parameters)

Cases = tuple[NDArray[np.float64], NDArray[np.int64]]


def cases(n: int, n_classes: int, spread: float, seed: int) -> Cases:
    """Return logits that tell the classes apart about four times of five, and the classes, all of them present."""
    rng = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, n - n_classes)])
    logits = rng.normal(size=(n, n_classes))
    logits[np.arange(n), targets] += 1.2
    return spread * logits, targets


def pooled(parts: list[Cases]) -> Cases:
    return np.concatenate([logits for logits, _ in parts]), np.concatenate([targets for _, targets in parts])


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(1, keepdims=True))


def exact_auc(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    probabilities = softmax(logits)
    ranked = logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else probabilities
    return float(roc_auc_score(targets, ranked, multi_class="ovr"))


def exact_ece(logits: NDArray[np.float64], targets: NDArray[np.int64]) -> float:
    probabilities = softmax(logits)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == targets
    bins = np.minimum((confidence * 15).astype(int), 14)
    gaps = [abs(right[bins == index].sum() - confidence[bins == index].sum()) for index in range(15)]
    return float(sum(gaps) / len(targets))


@pytest.mark.parametrize("settings", [BFV, DeltaSettings(cipher="none")], ids=["bfv", "none"])
@pytest.mark.parametrize("n_classes", [2, 3, 10])
def test_the_figures_of_pooled_cases_come_out_of_encrypted_sums(settings: DeltaSettings, n_classes: int) -> None:
    sites = [cases(n, n_classes, spread=2.0, seed=n) for n in (30, 80, 400)]
    encode, add, decode = encoder(settings, PUBLIC), summer(settings, PUBLIC), decoder(settings, SECRET)
    sent = [encode.encode_counts(Counts.of(*site).flat()) for site in sites]
    region = add.sum_counts(sent[:2], (1, 1), n_counts(n_classes))
    summed = add.sum_counts([region, sent[2]], (2, 1), n_counts(n_classes))
    counts = Counts.from_flat(decode.decode_counts(summed, 3, n_counts(n_classes)), n_classes)
    logits, targets = pooled(sites)
    found = counts.metrics()
    assert found["auc"] == pytest.approx(exact_auc(logits, targets), abs=0.002)
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, logits.argmax(1)))
    assert found["ece"] == pytest.approx(exact_ece(logits, targets), abs=0.005)
    recalls = recall_score(targets, logits.argmax(1), average=None)
    for index in range(n_classes):
        assert found[f"recall_{index}"] == pytest.approx(recalls[index])
        assert found[f"share_{index}"] == pytest.approx(float(np.mean(targets == index)))


@pytest.mark.parametrize("spread", [0.01, 0.1, 1.0, 8.0, 40.0])
@pytest.mark.parametrize("n_classes", [2, 5])
def test_auc_is_close_whether_the_model_is_hardly_ever_or_always_sure(spread: float, n_classes: int) -> None:
    logits, targets = cases(2000, n_classes, spread, seed=1)
    assert Counts.of(logits, targets).metrics()["auc"] == pytest.approx(exact_auc(logits, targets), abs=0.002)


def test_a_sum_of_counts_is_of_the_cases_together() -> None:
    one, other = cases(50, 3, 1.0, seed=1), cases(70, 3, 1.0, seed=2)
    together = Counts.of(*pooled([one, other]))
    np.testing.assert_array_equal((Counts.of(*one) + Counts.of(*other)).flat(), together.flat())


def test_a_class_without_a_case_leaves_auc_out() -> None:
    logits, targets = cases(50, 2, 1.0, seed=1)
    alone = targets == 1
    found = Counts.of(logits[alone], targets[alone]).metrics()
    assert set(found) == {"accuracy", "ece", "recall_1", "share_1"}


@pytest.mark.parametrize("index", [0, 2048, 2053, 2291])
def test_counts_that_contradict_each_other_are_refused(index: int) -> None:
    flat = Counts.of(*cases(50, 2, 1.0, seed=1)).flat()
    flat[index] += 1
    with pytest.raises(RefusedError, match="contradict") as raised:
        Counts.from_flat(flat, 2)
    assert raised.value.reason is Reason.MALFORMED


def test_an_evaluation_that_is_none_is_refused_and_named() -> None:
    encode, add = encoder(BFV, PUBLIC), summer(BFV, PUBLIC)
    good = encode.encode_counts(Counts.of(*cases(50, 2, 1.0, seed=1)).flat())
    longer = encode.encode_counts(np.zeros(n_counts(10), np.int64))
    for bad in ((), (b"none",), longer):
        with pytest.raises(RefusedChunkError) as raised:
            add.sum_counts([good, bad], (1, 1), n_counts(2))
        assert raised.value.index == 1


def test_a_sum_of_other_sites_than_it_says_is_refused() -> None:
    encode, decode = encoder(BFV, PUBLIC), decoder(BFV, SECRET)
    alone = encode.encode_counts(Counts.of(*cases(50, 2, 1.0, seed=1)).flat())
    with pytest.raises(RefusedError, match=r"unused counts|slots"):
        decode.decode_counts(alone, 2, n_counts(2))


def test_more_cases_than_a_field_holds_are_refused_before_they_are_encrypted() -> None:
    most = scheme.bfv(BFV).counts.qmax
    assert most > 30_000
    counts = np.zeros(n_counts(2), np.int64)
    counts[0] = most + 1
    with pytest.raises(LocalDataError, match=f"at most {most}"):
        encoder(BFV, PUBLIC).encode_counts(counts)
