"""Scores of students and references for each query, also in the precisions of a vector database.

A table has a row for each method, precision, split and query:

    method      `student`, or a reference with its number of dimensions, such as `svd_128`
    precision   `float32`; `int8`, each vector up to its largest entry, ranked by cosine; `binary`,
                signs, by Hamming distance; `binary_float_query`, signs, with an unquantized query
    split       `validation`, `test`, or `train`: training sentences used as queries
    row         of the query in the database
    recall@10, ndcg@10
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from kimi_recursive.files import write_parquet
from kimi_recursive.track_b.metrics import score_vectors
from kimi_recursive.track_b.neighbours import Floats
from kimi_recursive.track_b.student import svd_projection
from kimi_recursive.track_b.teacher import load_vectors
from kimi_recursive.track_b.truth import Truth, load_truth

# Bits of an entry in the database.
PRECISIONS = {"float32": 32, "int8": 8, "binary": 1, "binary_float_query": 1}
TEACHER = "teacher"


def bytes_per_vector(dim: int, precision: str) -> int:
    """Bytes of one vector in a database, without the database's own overhead."""
    return -(-dim * PRECISIONS[precision] // 8)


def quantize(vectors: Floats, precision: str) -> Floats:
    """Vectors [N, dim] rounded to a precision, as float32 for inner products: int8 vectors have
    unit length again, binary ones are signs."""
    if precision == "int8":
        whole = np.rint(vectors * (127 / np.abs(vectors).max(1, keepdims=True)))
        return whole / np.linalg.norm(whole, axis=1, keepdims=True)
    if precision.startswith("binary"):
        return np.where(vectors >= 0, np.float32(1), np.float32(-1))
    return vectors


def score_all(method: str, encoded: Floats, truth: Truth) -> pl.DataFrame:
    """The table of one method.

    Args:
        encoded: Vectors of the database [N, dim], of unit length.
    """
    tables = []
    for precision in PRECISIONS:
        database = quantize(encoded, precision)
        for split, rows in truth.queries.items():
            queries = (encoded if precision == "binary_float_query" else database)[rows]
            recall, ndcg = score_vectors(queries, database, rows, truth.relevant[split])
            facts = {"method": method, "precision": precision, "split": split, "row": rows}
            tables.append(pl.DataFrame({**facts, "recall@10": recall, "ndcg@10": ndcg}))
    return pl.concat(tables)


def references(vectors: Floats, dim: int) -> Mapping[str, Callable[[Floats], Floats]]:
    """Ways to shorten vectors without training.

    Args:
        vectors: Training vectors [N, D] that SVD (not centred) and PCA (centred) are fitted on.
    """
    mean = vectors.mean(0, dtype=np.float64).astype(np.float32)
    svd, pca = (svd_projection(vectors, dim, centred).T for centred in (False, True))
    shape = (vectors.shape[1], dim)
    random = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    return {
        "svd": lambda x: x @ svd,
        "pca": lambda x: (x - mean) @ pca,
        "truncation": lambda x: x[:, :dim],
        "random_projection": lambda x: x @ random,
    }


def evaluate_references(
    teacher_dir: str | Path,
    neighbours_path: str | Path,
    dims: Sequence[int],
    output_path: str | Path,
) -> None:
    """Write the table of all references with these dimensions, and of the teacher itself. It has a
    column `dim`."""
    vectors, truth = load_vectors(teacher_dir), load_truth(neighbours_path)
    methods = {
        f"{name}_{dim}": shorten
        for dim in dims
        for name, shorten in references(vectors["pool"], dim).items()
    }
    tables = []
    for name, shorten in {**methods, TEACHER: lambda x: x}.items():
        encoded = shorten(vectors["database"])
        encoded = encoded / np.linalg.norm(encoded, axis=1, keepdims=True)
        dim = pl.lit(encoded.shape[1]).alias("dim")
        tables.append(score_all(name, encoded, truth).with_columns(dim))
    write_parquet(output_path, pl.concat(tables))
