"""The teacher's neighbours: the nearest rows of each training row and of each query, found once.

`neighbours.npz` holds int32 rows, of the pool to train on (`train`, `close`) and of the database
(the others), as `load_vectors` has them:

    train             [N, k]        nearest rows of each row of the pool
    close             [P, 2]        pairs of rows of the pool with a similarity of at least
                                    `threshold`
    validation, test  [Q, 10]       nearest other rows of each held-out query
    train_queries     [<= 500]      training rows used as queries, to see overfitting
    train_query       [<= 500, 10]  their nearest other rows
    threshold         []
    num_extra         []            rows of the pool that are not in the database
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_recursive.files import replacing
from kimi_recursive.track_b.metrics import TOP
from kimi_recursive.track_b.neighbours import Floats, Rows, nearest, nearest_to_each_other
from kimi_recursive.track_b.sentences import EXTRA
from kimi_recursive.track_b.sheet import check_against_teacher
from kimi_recursive.track_b.teacher import load_vectors

NUM_TRAIN_QUERIES = 500


@dataclass(frozen=True)
class Truth:
    """Content of `neighbours.npz`.

    Attributes:
        queries: Rows of the `validation`, `test` and `train` queries in the database.
        relevant: Their ten nearest rows by the teacher.
    """

    train: Rows
    close: Rows
    threshold: float
    queries: dict[str, Rows]
    relevant: dict[str, Rows]

    def close_pairs(self, vectors: Floats, settings: Mapping[str, Any]) -> Rows:
        """The pairs [P, 2] that are false negatives under these settings.

        Args:
            vectors: The pool [N, D].
        """
        if settings["false_neg_mode"] == "none":
            return self.close[:0]
        assert self.threshold <= settings["threshold"]
        first, second = vectors[self.close[:, 0]], vectors[self.close[:, 1]]
        return self.close[np.einsum("ij,ij->i", first, second) >= settings["threshold"]]

    def digest(self, vectors: Floats, settings: Mapping[str, Any]) -> str:
        """Digest of the rows that a run with these settings reads; other rows do not change it."""
        used = [self.train[:, : settings["k"]], self.close_pairs(vectors, settings)]
        used += [
            rows for split in self.queries for rows in (self.queries[split], self.relevant[split])
        ]
        found = hashlib.sha256()
        for rows in used:
            found.update(f"{rows.shape}".encode() + np.ascontiguousarray(rows).tobytes())
        return found.hexdigest()


def find_neighbours(
    teacher_dir: str | Path, settings: Iterable[Mapping[str, Any]], output_path: str | Path
) -> None:
    """Write `neighbours.npz` for students with these settings.

    Raises:
        ValueError: settings do not fit the teacher, or it has too few vectors to rank ten.
    """
    vectors = load_vectors(teacher_dir)
    num_train, dim = vectors["train"].shape
    pool, database = vectors["pool"], vectors["database"]
    if num_train <= TOP:
        raise ValueError(
            f"{teacher_dir}: more than {TOP} training vectors are needed, got {num_train}"
        )
    for one in settings:
        check_against_teacher(one, dim, len(pool))
    k = max((one["k"] for one in settings), default=TOP)
    limits = [one["threshold"] for one in settings if one["false_neg_mode"] == "threshold"]
    _, train, close = nearest_to_each_other(pool, k, min(limits) if limits else None)
    ends = np.cumsum([num_train, len(vectors["validation"]), len(vectors["test"])])
    step = max(1, num_train // NUM_TRAIN_QUERIES)
    queries = {
        "validation": np.arange(ends[0], ends[1]),
        "test": np.arange(ends[1], ends[2]),
        "train_query": np.arange(num_train)[::step][:NUM_TRAIN_QUERIES],
    }
    found = {n: nearest(database[q], database, TOP, exclude=q)[1] for n, q in queries.items()}
    arrays = {"train": train, "close": close, "train_queries": queries["train_query"], **found}
    with replacing(output_path) as temporary, open(temporary, "wb") as file:
        small: dict[str, Any] = {name: rows.astype(np.int32) for name, rows in arrays.items()}
        limit, num_extra = np.float64(min(limits, default=np.inf)), np.int64(len(vectors[EXTRA]))
        np.savez(file, **small, threshold=limit, num_extra=num_extra)


def load_truth(path: str | Path) -> Truth:
    """Read `neighbours.npz`; rows as int64."""
    with np.load(path) as file:
        found = {name: file[name] for name in file.files}
    threshold, num_extra = float(found.pop("threshold")), int(found.pop("num_extra", 0))
    found = {name: rows.astype(np.int64) for name, rows in found.items()}
    num_train = len(found["train"]) - num_extra
    num_validation = len(found["validation"])
    queries = {
        "validation": num_train + np.arange(num_validation),
        "test": num_train + num_validation + np.arange(len(found["test"])),
        "train": found["train_queries"],
    }
    relevant = {split: found["train_query" if split == "train" else split] for split in queries}
    return Truth(found["train"], found["close"], threshold, queries, relevant)
