"""Exact nearest neighbours by cosine, blockwise: no approximate index, bounded memory.

All vectors have unit length, so an inner product is a cosine. Besides the vectors and the result,
memory holds a few blocks of `BLOCK` x `BLOCK` similarities (16 MiB each). Products and the bound
are numpy's: its matrix product is faster on AMD, and its partition is vectorised. `torch.topk` of
whole blocks takes 1.7 times as long (docs/log.md).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

BLOCK = 2048
NUM_GROUPS = 16  # groups of columns; their maxima bound the k-th largest from below

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


class _Best:
    """The k nearest rows found so far for each query, nearest first.

    Attributes:
        pairs: Query and row of all similarities of at least `threshold`.
    """

    def __init__(self, num_queries: int, k: int, threshold: float = np.inf):
        self.similarities = np.full((num_queries, k), -np.inf, np.float32)
        self.rows = np.full((num_queries, k), -1, np.int64)
        self.threshold = threshold
        self.pairs: list[Rows] = []

    def update(self, block: Floats, start: int, queries_are_columns: bool = False) -> None:
        """Add similarities to the rows from `start` on: [queries, rows], or [rows, queries]."""
        k, axis = self.rows.shape[1], 0 if queries_are_columns else 1
        bound = np.minimum(
            np.maximum(self.similarities[:, -1], _bound(block, k, axis)), self.threshold
        )
        found = np.flatnonzero(block >= np.expand_dims(bound, axis))
        query, column = np.divmod(found, block.shape[1])
        if queries_are_columns:
            order = np.argsort(column.astype(np.uint16), kind="stable")
            query, column, found = column[order], query[order], found[order]
        counts = np.bincount(query, minlength=len(bound))
        place = k + np.arange(len(found)) - np.repeat(counts.cumsum() - counts, counts)
        similarities = np.full((len(bound), k + counts.max(initial=0)), -np.inf, np.float32)
        rows = np.full(similarities.shape, -1, np.int64)
        similarities[:, :k], rows[:, :k] = self.similarities, self.rows
        values = block.ravel()[found]
        similarities[query, place], rows[query, place] = values, column + start
        best = torch.from_numpy(similarities).topk(k)
        self.similarities = best.values.numpy()
        self.rows = np.take_along_axis(rows, best.indices.numpy(), 1)
        close = values >= self.threshold
        self.pairs.append(np.stack([query[close], column[close] + start], 1))


def _bound(block: Floats, k: int, axis: int) -> Floats:
    """A lower bound of the k-th largest similarity along an axis: the k-th largest of the maxima of
    groups."""
    group = block.shape[axis] // NUM_GROUPS
    if group <= k:
        return np.full(block.shape[1 - axis], -np.inf, np.float32)
    if axis == 0:
        maxima = block[: group * NUM_GROUPS].reshape(NUM_GROUPS, group, -1).max(0).T
    else:
        maxima = block[:, : group * NUM_GROUPS].reshape(-1, NUM_GROUPS, group).max(1)
    return np.partition(maxima, group - k, axis=1)[:, group - k]


def nearest(
    queries: Floats, database: Floats, k: int, exclude: Rows | None = None
) -> tuple[Floats, Rows]:
    """The k nearest rows of a database.

    Args:
        queries: [Q, D].
        database: [N, D], N at least k, and above k with `exclude`.
        exclude: [Q]; a row that each query must not find (itself).

    Returns: similarities [Q, k], descending, and rows [Q, k].
    """
    assert len(database) >= k + (exclude is not None)
    found = []
    for i in range(0, len(queries), BLOCK):
        part = queries[i : i + BLOCK]
        best = _Best(len(part), k)
        for start in range(0, len(database), BLOCK):
            block = part @ database[start : start + BLOCK].T
            if exclude is not None:
                column = exclude[i : i + BLOCK] - start
                inside = np.flatnonzero((column >= 0) & (column < block.shape[1]))
                block[inside, column[inside]] = -np.inf
            best.update(block, start)
        found.append(best)
    return np.concatenate([b.similarities for b in found]), np.concatenate([b.rows for b in found])


def nearest_to_each_other(
    vectors: Floats, k: int, threshold: float | None = None
) -> tuple[Floats, Rows, Rows]:
    """The k nearest other rows of every row, and all pairs with a similarity of at least a
    threshold.

    Similarities are symmetric, so each block is computed once and used for rows and columns.

    Args:
        vectors: [N, D], N above k.

    Returns: similarities [N, k], descending; rows [N, k]; sorted pairs [P, 2], each in both
        directions.
    """
    assert len(vectors) > k
    starts = range(0, len(vectors), BLOCK)
    limit = np.inf if threshold is None else threshold
    best = [_Best(len(vectors[start : start + BLOCK]), k, limit) for start in starts]
    blocks = [(i, j) for i in range(len(starts)) for j in range(i, len(starts))]
    for i, j in tqdm(blocks, desc="neighbours", unit="block", mininterval=2.0):
        block = vectors[starts[i] : starts[i] + BLOCK] @ vectors[starts[j] : starts[j] + BLOCK].T
        if i == j:
            np.fill_diagonal(block, -np.inf)
        else:
            best[j].update(block, starts[i], queries_are_columns=True)
        best[i].update(block, starts[j])
    pairs = np.concatenate(
        [p + np.array([s, 0]) for s, b in zip(starts, best, strict=True) for p in b.pairs]
    )
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    similarities = np.concatenate([b.similarities for b in best])
    return similarities, np.concatenate([b.rows for b in best]), pairs
