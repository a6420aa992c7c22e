"""Does one arm beat another? Paired bootstrap over documents, with seeds as the outer level."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import polars as pl

from kimi_recursive.files import read_parquet

NUM_RESAMPLES = 10_000
BLOCK = 500
MAX_KEPT = 25_000_000  # weights in memory, of 4 bytes
CONFIDENCE = 0.95
DOCUMENT_COLUMNS = ("document_id", "step", "num_tokens", "loss_sum")
Losses = tuple[Path, pl.DataFrame]
VERDICTS = {-1: "helps", 0: "not distinguishable", 1: "hurts"}


@dataclass(frozen=True)
class Difference:
    """Loss of an arm minus that of its reference, in nats per token; negative is better.

    Attributes:
        mean: Over seeds, of the difference over all tokens.
        low, high: Bounds of the interval.
        verdict: `helps`, `hurts`, or `not distinguishable` when the interval holds 0.
        confidence: Of the interval.
    """

    mean: float
    low: float
    high: float
    num_documents: int
    num_seeds: int
    confidence: float = CONFIDENCE

    @property
    def verdict(self) -> str:
        return VERDICTS[-1 if self.high < 0 else 1 if self.low > 0 else 0]

    @property
    def percent(self) -> tuple[float, float, float]:
        """Mean and bounds as percent of the reference's perplexity."""
        mean, low, high = (100 * np.expm1(x) for x in (self.mean, self.low, self.high))
        return float(mean), float(low), float(high)


def paired_bootstrap(
    differences: np.ndarray,
    num_tokens: np.ndarray,
    seed: int = 0,
    resamples: int = NUM_RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Percentile interval of the mean difference per token (Efron and Tibshirani, 1993, ch. 13).

    Each resample draws documents with replacement, the same ones for every seed, since documents
    are paired across arms and seeds. The outer level, seeds, adds their standard error times a draw
    from Student's t: resampling three seeds would be far too narrow (docs/log.md). With one seed
    the interval says nothing of the spread over seeds.

    Args:
        differences: Summed loss of the arm minus that of the reference, [seeds, documents], nats.
        num_tokens: Scored tokens of each document [documents].
        confidence: Of the interval.
    """
    num_seeds, num_documents = differences.shape
    over_seeds = differences.mean(0)
    generator = np.random.default_rng(seed)
    if num_documents * resamples <= MAX_KEPT:
        weights, state = _kept_weights(num_documents, seed, resamples)
        generator.bit_generator.state = state
    else:
        weights = _weights(generator, num_documents, resamples)
    means = np.concatenate([(w @ over_seeds) / (w @ num_tokens) for w in weights])
    if num_seeds > 1:
        per_seed = differences.sum(1) / num_tokens.sum()
        error = per_seed.std(ddof=1) / np.sqrt(num_seeds)
        means += error * generator.standard_t(num_seeds - 1, size=resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    mean = over_seeds.sum() / num_tokens.sum()
    return Difference(float(mean), float(low), float(high), num_documents, num_seeds, confidence)


def _weights(
    generator: np.random.Generator, num_documents: int, resamples: int
) -> Iterator[np.ndarray]:
    """How often each resample draws each document, in blocks [block, documents] that bound the
    memory."""
    share = np.full(num_documents, 1 / num_documents)
    for start in range(0, resamples, BLOCK):
        size = min(BLOCK, resamples - start)
        yield generator.multinomial(num_documents, share, size=size)


@lru_cache(maxsize=1)
def _kept_weights(
    num_documents: int, seed: int, resamples: int
) -> tuple[list[np.ndarray], Mapping[str, Any]]:
    """The weights, which many comparisons over the same documents share, and the generator's state
    behind them."""
    generator = np.random.default_rng(seed)
    blocks = [w.astype(np.int32) for w in _weights(generator, num_documents, resamples)]
    return blocks, generator.bit_generator.state


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson, 1927), which also serves for 0 and 100 %."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    share, spread = successes / trials, z * z / trials
    middle = (share + spread / 2) / (1 + spread)
    half = z * sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def compare_documents(
    arm: Sequence[Path],
    reference: Sequence[Path],
    arm_step: int,
    reference_step: int,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Difference of two arms from their `<name>_documents.parquet`, one file a seed, in order.

    Raises:
        ValueError: a file is missing or damaged, or the two did not score the same tokens of the
            same documents.
    """
    return compare_losses(
        [(path, _losses(path, arm_step)) for path in arm],
        [(path, _losses(path, reference_step)) for path in reference],
        "did not score the same tokens",
        confidence,
    )


def compare_losses(
    arm: Sequence[Losses],
    reference: Sequence[Losses],
    otherwise: str,
    confidence: float = CONFIDENCE,
) -> Difference:
    """Difference of two arms, one table a seed, in order.

    A reference of one table (the baseline) stands for all seeds.

    Args:
        arm, reference: Where each table is from, and its columns document_id, num_tokens and
            loss_sum.
        otherwise: What is said of two that differ in documents or tokens.

    Raises:
        ValueError: they differ.
    """
    reference = list(reference) * (len(arm) if len(reference) == 1 else 1)
    rows, tokens = [], np.empty(0)
    for (mine, losses), (other, others) in zip(arm, reference, strict=True):
        joined = losses.join(
            others,
            on=["document_id", "num_tokens"],
            how="full",
            coalesce=True,
            suffix="_reference",
        )
        if joined["loss_sum"].null_count() or joined["loss_sum_reference"].null_count():
            raise ValueError(f"{mine} and {other} {otherwise}")
        joined = joined.sort("document_id")
        rows.append((joined["loss_sum"] - joined["loss_sum_reference"]).to_numpy())
        tokens = joined["num_tokens"].to_numpy()
    return paired_bootstrap(np.stack(rows), tokens, confidence=confidence)


def _losses(path: Path, step: int) -> pl.DataFrame:
    table = read_parquet(path, DOCUMENT_COLUMNS).select(DOCUMENT_COLUMNS)
    return table.filter(pl.col("step") == step).drop("step")
