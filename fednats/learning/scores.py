"""Metrics from counts that hospitals can add up: histograms instead of the scores themselves.

Each site counts; the sum over sites gives the metrics of all pooled test cases: AUC, accuracy, recall of every class,
calibration. The sum does not show which site has which cases.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fednats.errors import Reason, RefusedError

N_BINS = 1024
"""Bins of a class's scores."""

LOG_ODDS_RANGE = 512.0
"""Scores are binned by log-odds, from minus to plus this value."""

LOG_ODDS_FINE = 0.05
"""Log-odds around 0 where bins are equally wide. Beyond, they widen, since an early model is hardly ever sure."""

N_CONFIDENCE_BINS = 15
"""Bins of the calibration error, as in Guo et al. 2017."""

_PER_BIN = 8
"""Finer bins per confidence bin, from which its mean confidence is computed."""

MAX_CLASSES = 1000


@dataclass(frozen=True)
class Counts:
    """Counts over the test cases of one or several sites, int64, not negative.

    With two classes, only class 1 is ranked: class 0 is its mirror image.
    """

    positives: NDArray[np.int64]
    """[ranked classes, N_BINS]: cases of the class, by the bin of their score for it."""
    negatives: NDArray[np.int64]
    """[ranked classes, N_BINS]: cases of the other classes, likewise."""
    confusion: NDArray[np.int64]
    """[classes, classes]: cases of the row's class that were predicted as the column's."""
    confidence: NDArray[np.int64]
    """[2, bins]: cases with a wrong (0) and a right (1) prediction, by the model's confidence."""

    @classmethod
    def of(cls, logits: NDArray[np.float64], targets: NDArray[np.int64]) -> "Counts":
        """Count cases: ``logits`` float64[n, classes], ``targets`` int64[n]."""
        n_classes = logits.shape[1]
        odds = _log_odds(logits)
        taken_for = logits.argmax(1)
        confusion = np.zeros((n_classes, n_classes), np.int64)
        np.add.at(confusion, (targets, taken_for), 1)
        n_fine = N_CONFIDENCE_BINS * _PER_BIN
        surest = 1 / (1 + (n_classes - 1) * np.exp(-odds.max(1)))
        sure = np.minimum((surest * n_fine).astype(np.int64), n_fine - 1)
        confidence = np.zeros((2, n_fine), np.int64)
        np.add.at(confidence, ((taken_for == targets).astype(np.int64), sure), 1)
        ranked = range(1, 2) if n_classes == 2 else range(n_classes)  # noqa: PLR2004 - binary
        histograms = [
            np.stack([_histogram(odds[(targets == index) == own, index]) for index in ranked]) for own in (True, False)
        ]
        return cls(histograms[0], histograms[1], confusion, confidence)

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.confusion)

    @property
    def n_cases(self) -> int:
        """Number of test cases counted."""
        return int(self.confusion.sum())

    def flat(self) -> NDArray[np.int64]:
        """Return all counts, int64[`n_counts`]."""
        return np.concatenate(
            [part.ravel() for part in (self.positives, self.negatives, self.confusion, self.confidence)]
        )

    @classmethod
    def from_flat(cls, flat: NDArray[np.int64], n_classes: int) -> "Counts":
        """Undo `flat`.

        Raises:
            RefusedError: ``malformed``: a count is negative, or the parts contradict each other.
        """
        n_ranked = _n_ranked(n_classes)
        ends = np.cumsum([n_ranked * N_BINS, n_ranked * N_BINS, n_classes**2])
        positives, negatives, confusion, confidence = np.split(flat, ends)
        counts = cls(
            positives.reshape(n_ranked, N_BINS),
            negatives.reshape(n_ranked, N_BINS),
            confusion.reshape(n_classes, n_classes),
            confidence.reshape(2, -1),
        )
        n_cases = confusion.sum()
        own = counts.confusion.sum(1)[-n_ranked:]
        if (
            flat.min() < 0
            or (counts.positives.sum(1) != own).any()
            or (counts.negatives.sum(1) != n_cases - own).any()
            or confidence.sum() != n_cases
            or counts.confidence[1].sum() != np.trace(counts.confusion)
        ):
            raise RefusedError(Reason.MALFORMED, "counts of an evaluation that contradict each other")
        return counts

    def __add__(self, other: "Counts") -> "Counts":
        """Pool two disjoint sets of cases."""
        return Counts.from_flat(self.flat() + other.flat(), self.n_classes)

    def metrics(self) -> dict[str, float]:
        """Return ``accuracy``, ``ece``, ``recall_C`` and ``share_C`` of every class C that has a case, and ``auc``.

        ``auc``: one against the rest, averaged over the classes, ties within a bin count half; left out if a class has
        no case. ``ece``: expected calibration error (Guo et al. 2017, arXiv:1706.04599, section 2); the mean confidence
        of a bin comes from finer bins. ``share``: the class's share of all cases.
        """
        n_cases = self.n_cases
        own = self.confusion.sum(1)
        found = {"accuracy": float(np.trace(self.confusion) / n_cases), "ece": self._ece(n_cases)}
        for index in np.flatnonzero(own):
            found[f"recall_{index}"] = float(self.confusion[index, index] / own[index])
            found[f"share_{index}"] = float(own[index] / n_cases)
        if own.all():
            found["auc"] = float(np.mean([_auc(*pair) for pair in zip(self.positives, self.negatives, strict=True)]))
        return found

    def roc(self, n_points: int) -> dict[str, list[tuple[float, float]]]:
        """Return the ROC curves of ranked classes, one against the rest, from (0, 0) to (1, 1).

        A class needs cases of its own and of the others. Each curve, by the class's number, has at most ``n_points``
        pairs of false and true positive rate (Fawcett 2006).
        """
        first = self.n_classes - len(self.positives)
        found = {}
        for index, pair in enumerate(zip(self.negatives, self.positives, strict=True), start=first):
            if all(counts.any() for counts in pair):
                false, true = (np.concatenate([[0], np.cumsum(counts[::-1])]) / counts.sum() for counts in pair)
                found[str(index)] = _thinned(false, true, n_points)
        return found

    def _ece(self, n_cases: int) -> float:
        centres = (np.arange(self.confidence.shape[1]) + 0.5) / self.confidence.shape[1]
        n = self.confidence.sum(0)
        right, sure = (part.reshape(N_CONFIDENCE_BINS, _PER_BIN).sum(1) for part in (self.confidence[1], n * centres))
        return float(np.abs(right - sure).sum() / n_cases)


def pooled_names(n_classes: int) -> tuple[str, ...]:
    """Return the names of all metrics that counts can give, defined or not; empty if no classes are counted.

    >>> pooled_names(2)
    ('auc', 'accuracy', 'ece', 'recall_0', 'recall_1', 'share_0', 'share_1')
    """
    if not n_classes:
        return ()
    of_classes = [f"{name}_{index}" for name in ("recall", "share") for index in range(n_classes)]
    return ("auc", "accuracy", "ece", *of_classes)


def n_counts(n_classes: int) -> int:
    """Return the number of counts; 0 if no classes are counted.

    >>> n_counts(0), n_counts(2), n_counts(10)
    (0, 2292, 20820)
    """
    if not n_classes:
        return 0
    return 2 * _n_ranked(n_classes) * N_BINS + n_classes**2 + 2 * N_CONFIDENCE_BINS * _PER_BIN


def _n_ranked(n_classes: int) -> int:
    return 1 if n_classes == 2 else n_classes  # noqa: PLR2004 - binary


def _log_odds(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the log-odds of each class against all others, float64[n, classes]; 0 if all are equally likely."""
    others = [np.delete(logits, index, axis=1) for index in range(logits.shape[1])]
    against = np.stack([np.logaddexp.reduce(each, axis=1) for each in others], axis=1)
    return np.asarray(logits - against + np.log(len(others) - 1))


def _histogram(log_odds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count the scores in each bin, int64[N_BINS]."""
    places = np.arcsinh(np.clip(log_odds, -LOG_ODDS_RANGE, LOG_ODDS_RANGE) / LOG_ODDS_FINE)
    places /= 2 * np.arcsinh(LOG_ODDS_RANGE / LOG_ODDS_FINE)
    bins = np.minimum(((places + 0.5) * N_BINS).astype(np.int64), N_BINS - 1)
    return np.bincount(bins, minlength=N_BINS).astype(np.int64)


def _auc(positives: NDArray[np.int64], negatives: NDArray[np.int64]) -> float:
    """Return the probability that a positive case is in a higher bin than a negative one; a tie counts half."""
    below = np.concatenate([[0], np.cumsum(negatives)[:-1]])
    return float((positives * (below + negatives / 2)).sum() / (positives.sum() * negatives.sum()))


def _thinned(false: NDArray[np.float64], true: NDArray[np.float64], n_points: int) -> list[tuple[float, float]]:
    """Return points about evenly spaced along a curve, both ends included."""
    way = false + true
    chosen = np.unique(np.searchsorted(way, np.linspace(0.0, way[-1], n_points)))
    return [(round(float(false[at]), 4), round(float(true[at]), 4)) for at in chosen]
