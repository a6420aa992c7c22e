"""How well vectors keep the teacher's neighbours: exact search over all other sentences.

`recall@10` is the share of the teacher's ten nearest that are among the student's ten nearest;
`ndcg@10` takes the teacher's ten as equally relevant: the sum of 1 / log2(rank + 1) over hits,
divided by the sum for ten hits at ranks 1 to 10 (Jarvelin and Kekalainen, 2002).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kimi_recursive.track_b.neighbours import Floats, Rows, nearest

TOP = 10
RECALL, NDCG = "vs_teacher_recall@10", "vs_teacher_ndcg@10"
Scores = NDArray[np.float64]


def score_rankings(found: Rows, relevant: Rows) -> tuple[Scores, Scores]:
    """Recall and nDCG of each query.

    Args:
        found: Rows [Q, n], best first; -1 if there are fewer.
        relevant: Rows that the teacher finds [Q, n], in any order.
    """
    hits = (found[:, :, None] == relevant[:, None, :]).any(2)
    discounts = 1 / np.log2(np.arange(found.shape[1]) + 2.0)
    return hits.sum(1) / relevant.shape[1], hits @ discounts / discounts[: relevant.shape[1]].sum()


def score_vectors(
    queries: Floats, database: Floats, query_rows: Rows, relevant: Rows
) -> tuple[Scores, Scores]:
    """Recall and nDCG of each query, by inner product.

    Args:
        queries: [Q, D].
        database: [N, D], all sentences.
        query_rows: [Q], rows of the queries in the database.
        relevant: [Q, TOP], the teacher's nearest rows.
    """
    found = nearest(queries, database, relevant.shape[1], exclude=query_rows)[1]
    return score_rankings(found, relevant)
