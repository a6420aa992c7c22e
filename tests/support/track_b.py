"""A tiny teacher, and settings of students that train on it in a second."""

from pathlib import Path

import numpy as np

from kimi_recursive.track_b.sheet import parse_row

TEACHER = {"kind": "vectors", "hub_id": None, "revision": None}
V1 = {
    "steps": 12, "warmup": 2, "save_every": 4, "eval_every": 3, "dim": 8, "hidden": 16, "lr": 0.01,
    "batch_size": 16, "k": 5, "neg_m": 32, "queue_size": 50, "threshold": 0.75,
}  # fmt: skip
V2 = {
    **V1, "objective": "listwise", "student": "residual", "init": "svd", "num_positives": 3,
    "queue_size": 0, "false_neg_mode": "none", "noise": 0.3, "mix": 0.5,
    "weight_decay": 0.01,
}  # fmt: skip


def settings_of(values: dict, **more) -> dict:
    return parse_row({"experiment": "x", **values, **more}, "test").settings


def clustered_vectors(num: int = 400, dim: int = 24, seed: int = 0) -> np.ndarray:
    """Points around 20 centres, of any length."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((20, dim))
    points = centres[rng.integers(20, size=num)] + 0.6 * rng.standard_normal((num, dim))
    return points.astype(np.float32)


def make_teacher(folder: Path, vectors: np.ndarray | None = None) -> Path:
    """`teacher/` and `neighbours.npz` in a folder: 300 training vectors, 50 and 50 queries."""
    # Here, since tests of the sheet do without torch.
    from kimi_recursive.track_b.teacher import import_vectors
    from kimi_recursive.track_b.truth import find_neighbours

    np.save(folder / "vectors.npy", clustered_vectors() if vectors is None else vectors)
    settings = {**TEACHER, "path": str(folder / "vectors.npy")}
    import_vectors(settings, None, 50, 50, 0, folder / "teacher")
    wanted = [settings_of(V1), settings_of(V2)]
    find_neighbours(folder / "teacher", wanted, folder / "neighbours.npz")
    return folder
