"""What a model did with each sample of a task, and what that says: a score, or a difference.

A score is a function of the mean outcome (over the weights of the samples), so its standard error
and the difference of two models follow from the samples alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np
import polars as pl

from kimi_recursive.evaluation.bootstrap import Difference, compare_losses
from kimi_recursive.files import read_parquet

SAMPLE_COLUMNS = ("task", "metric", "sample", "outcome", "weight")


class Statistic(StrEnum):
    """What a metric makes of the mean outcome.

    `mean` is the mean itself, such as the share of right answers. The others take the
    log-likelihood in nats per unit (token, word or byte): its `perplexity`, or its `bits`.
    """

    MEAN = "mean"
    PERPLEXITY = "perplexity"
    BITS = "bits"

    def score(self, outcomes: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
        """Value and standard error over samples: that of a ratio of sums, by the delta method; of
        a mean with equal weights, the usual one."""
        x, w = np.asarray(outcomes, float), np.asarray(weights, float)
        mean, n = x.sum() / w.sum(), len(x)
        with np.errstate(all="ignore"):
            error = math.sqrt(((x - mean * w) ** 2).sum() * n / (n - 1)) / w.sum()
            if self is Statistic.PERPLEXITY:
                return float(np.exp(-mean)), float(np.exp(-mean) * error)
        if self is Statistic.BITS:
            return float(-mean / math.log(2)), float(error / math.log(2))
        return float(mean), float(error)

    def sign(self, higher_is_better: bool) -> int:
        """What makes a loss, of which the lower is better, of an outcome."""
        return -1 if higher_is_better or self is not Statistic.MEAN else 1

    def change(self, loss: Difference, higher_is_better: bool) -> tuple[float, float, float]:
        """Mean and bounds of a difference of losses, as the metric changes: of a perplexity in
        percent, else in its own unit."""
        if self is Statistic.PERPLEXITY:
            return loss.percent
        found = loss.mean, loss.low, loss.high
        if self is Statistic.BITS:
            mean, low, high = (x / math.log(2) for x in found)
            return mean, low, high
        if higher_is_better:  # 0.0 - x, since -x of 0 would be shown with a sign
            return 0.0 - loss.mean, 0.0 - loss.high, 0.0 - loss.low
        return found


def compare_samples(
    arm: Sequence[Path], reference: Sequence[Path], task: str, metric: str, sign: int
) -> Difference:
    """Difference of two arms in a metric, from their files of samples, one a seed, in order.

    Args:
        sign: Of `Statistic.sign`.

    Raises:
        ValueError: a file is missing or damaged, or the two were not asked the same samples.
    """

    def losses(paths: Sequence[Path]) -> list[tuple[Path, pl.DataFrame]]:
        return [(path, _losses(path, task, metric, sign)) for path in paths]

    return compare_losses(losses(arm), losses(reference), "were not asked the same samples")


def _losses(path: Path, task: str, metric: str, sign: int) -> pl.DataFrame:
    """As `compare_losses` takes them."""
    mine = (pl.col("task") == task) & (pl.col("metric") == metric)
    return (
        read_parquet(path, SAMPLE_COLUMNS)
        .filter(mine)
        .select(document_id="sample", num_tokens="weight", loss_sum=sign * pl.col("outcome"))
    )
