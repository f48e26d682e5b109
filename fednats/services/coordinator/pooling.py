"""Compute figures over all hospitals' test cases from the encrypted sums that regions send."""

import operator
from collections.abc import Callable, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

from fednats.config import DeltaSettings
from fednats.delta.scheme import count_bits
from fednats.errors import Reason, RefusedChunkError, RefusedError
from fednats.learning.figures import Share, known_names, n_integers, read_figures
from fednats.learning.scores import Counts, n_counts
from fednats.messages import EvaluationSum
from fednats.services.daemon.answers import PooledEvaluation

MAX_CONFUSION_CLASSES = 30
MAX_ROC_CLASSES = 10
"""With more classes, the confusion matrix or the ROC curves are left out, so the status fits into one message."""

ROC_POINTS = 60

DecodeCounts = Callable[[Sequence[bytes], int, int], NDArray[np.int64]]
"""Called with the chunks of a sum, its number of sites and its number of counts. Returns the counts, int64[n].

Raises RefusedError.
"""


def pool(
    decode: DecodeCounts,
    settings: DeltaSettings,
    inputs: Sequence[Sequence[bytes]],
    heads: Sequence[EvaluationSum],
    min_sites: int,
) -> PooledEvaluation:
    """Decrypt the chunks of several regions' sums, and compute the figures over all their test cases.

    Class counts give figures over the pooled cases; sums of figures give means over the hospitals. A mean over fewer
    than ``min_sites`` hospitals is left out, to reveal no single hospital's figure. ``heads`` must all have the same
    classes, arrangement and key.

    Raises:
        RefusedChunkError: a sum is malformed, its counts are impossible for its number of sites, or its number of test
            cases differs from its head's; ``index`` says which. The others can be pooled without it.
    """
    n_classes, arrangement, bits = heads[0].n_classes, heads[0].arrangement, count_bits(settings)
    names = () if arrangement is None else known_names([head.figures for head in heads], arrangement)
    counts, shares = list[Counts](), dict[str, Share]()
    for index, (chunks, head) in enumerate(zip(inputs, heads, strict=True)):
        try:
            flat = decode(chunks, head.n_sites, n_integers(n_classes, arrangement, bits))
            if n_classes:
                counts.append(Counts.from_flat(flat[: n_counts(n_classes)], n_classes))
                _check_cases(counts[-1].n_cases, head)
            if arrangement is not None:
                figures = flat[n_counts(n_classes) :]
                n_cases, found = read_figures(figures, names, arrangement, bits, head.n_sites)
                _check_cases(n_cases, head)
                shares |= {name: share + shares[name] if name in shares else share for name, share in found.items()}
        except RefusedError as error:
            raise RefusedChunkError(error.reason, error.detail, index) from None
    n_samples = sum(head.n_samples for head in heads)
    means = {name: share.value for name, share in shares.items() if share.n_sites >= min_sites}
    if not counts:
        return PooledEvaluation(n_samples, {}, means, [], {})
    pooled = reduce(operator.add, counts)
    return PooledEvaluation(
        n_samples=n_samples,
        metrics=pooled.metrics(),
        means=means,
        confusion=pooled.confusion.tolist() if n_classes <= MAX_CONFUSION_CLASSES else [],
        roc=pooled.roc(ROC_POINTS) if n_classes <= MAX_ROC_CLASSES else {},
    )


def _check_cases(n_cases: int, head: EvaluationSum) -> None:
    if n_cases != head.n_samples:
        raise RefusedError(
            Reason.TEST_CASES,
            f"counts of {n_cases} test cases from {head.region}, whose hospitals registered {head.n_samples}",
        )
