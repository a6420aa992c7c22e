"""Exact neighbours, and the metrics that stand on them."""

from unittest import mock

import numpy as np
import pytest
import torch
from track_b import clustered_vectors

from kimi_recursive.track_b import neighbours
from kimi_recursive.track_b.metrics import score_rankings, score_vectors
from kimi_recursive.track_b.neighbours import nearest, nearest_to_each_other


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def by_sorting(queries, database, k, exclude=None):
    similarities = queries.astype(np.float64) @ database.T.astype(np.float64)
    if exclude is not None:
        similarities[np.arange(len(queries)), exclude] = -np.inf
    rows = np.argsort(-similarities, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarities, rows, 1), rows


# Blocks and groups that do not divide the sizes, one block for all, groups no larger than k.
@pytest.mark.parametrize("block, groups", [(37, 16), (64, 4), (128, 2), (4096, 16), (3, 16)])
@pytest.mark.parametrize("k", [1, 7, 30])
def test_they_are_those_of_sorting_all_similarities(monkeypatch, block, groups, k):
    monkeypatch.setattr(neighbours, "BLOCK", block)
    monkeypatch.setattr(neighbours, "NUM_GROUPS", groups)
    vectors = unit(clustered_vectors(150))
    own = np.arange(150)
    similarities, rows = by_sorting(vectors, vectors, k, own)
    found, found_rows, pairs = nearest_to_each_other(vectors, k, threshold=0.8)
    assert np.abs(found - similarities).max() < 1e-6
    assert np.array_equal(found_rows, rows)
    dense = vectors @ vectors.T
    np.fill_diagonal(dense, 0)
    assert np.array_equal(pairs, np.argwhere(dense >= 0.8)) and len(pairs) > 100
    queries = unit(clustered_vectors(21, seed=1))
    assert np.array_equal(nearest(queries, vectors, k)[1], by_sorting(queries, vectors, k)[1])
    some = own[100:]
    assert np.array_equal(nearest(vectors[some], vectors, k, exclude=some)[1], rows[some])


def test_equal_similarities_are_all_found(monkeypatch):
    monkeypatch.setattr(neighbours, "BLOCK", 16)
    vectors = np.zeros((40, 4), np.float32)
    vectors[:, 0] = 1  # all the same
    similarities, rows, pairs = nearest_to_each_other(vectors, 5, threshold=1.0)
    assert (similarities == 1).all() and len(pairs) == 40 * 39
    assert all(len(set(row)) == 5 and own not in row for own, row in enumerate(rows))


def test_no_threshold_no_pairs():
    assert len(nearest_to_each_other(unit(clustered_vectors(30)), 3)[2]) == 0


def test_recall_and_ndcg_by_hand():
    relevant = np.arange(10)[None].repeat(4, 0)
    found = np.array(
        [
            range(10),  # all, in order
            range(9, -1, -1),  # all, in another order: both are binary
            [0, 90, 91, 92, 93, 94, 95, 96, 97, 98],  # one hit, first
            [90, 91, 92, 3, 93, 94, 95, 96, 97, -1],  # one hit, fourth
        ]
    )
    recall, ndcg = score_rankings(found, relevant)
    assert np.array_equal(recall, [1, 1, 0.1, 0.1])
    ideal = 1 + 0.6309297536 + 0.5 + 0.4306765581 + 0.3868528072 + 0.3562071871
    ideal += 1 / 3 + 0.3154648768 + 0.3010299957 + 0.2890648263  # 1 / log2(rank + 1)
    assert ndcg == pytest.approx([1, 1, 1 / ideal, 0.4306765581 / ideal], abs=1e-9)
    # Fewer relevant than ranks: the ideal has only as many hits.
    recall, ndcg = score_rankings(np.array([[7, 1, 2]]), np.array([[7]]))
    assert recall == [1] and ndcg == [1]


def test_they_are_those_of_sentence_transformers():
    """Against `InformationRetrievalEvaluator`, whose model here looks vectors up."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    teacher = unit(clustered_vectors(200))
    student = unit(teacher[:, :6])
    rows = np.arange(150, 200)
    relevant = nearest(teacher[rows], teacher, 10, exclude=rows)[1]
    recall, ndcg = score_vectors(student[rows], student, rows, relevant)

    class Lookup:
        similarity_fn_name = "cosine"
        truncate_dim = None
        model_card_data = mock.Mock()

        def encode_query(self, texts, **_options):
            return torch.from_numpy(student[[int(text) for text in texts]])

        encode_document = encode = encode_query

    # It has no notion of a query that is itself in the corpus: ask one by one, without it.
    theirs = []
    for query, wanted in zip(rows, relevant, strict=True):
        evaluator = InformationRetrievalEvaluator(
            queries={"q": str(query)},
            corpus={str(row): str(row) for row in range(200) if row != query},
            relevant_docs={"q": {str(row) for row in wanted}},
            mrr_at_k=[10], ndcg_at_k=[10], accuracy_at_k=[10], map_at_k=[10],
            precision_recall_at_k=[10], write_csv=False, show_progress_bar=False,
            score_functions={"cosine": _inner_products}, name="x",
        )  # fmt: skip
        found = evaluator(Lookup())
        theirs.append((found["x_cosine_recall@10"], found["x_cosine_ndcg@10"]))
    theirs = np.array(theirs)
    assert 0.2 < recall.mean() < 0.9, "neither nothing nor everything"
    assert np.abs(recall - theirs[:, 0]).max() < 1e-9
    assert np.abs(ndcg - theirs[:, 1]).max() < 1e-9


def _inner_products(a, b):
    return a @ b.T
