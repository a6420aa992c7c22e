"""Quick checks of Track-B on the real vectors before training: they warn, and never stop a run."""

from __future__ import annotations

import math
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimi_recursive.files import write_json
from kimi_recursive.track_b.metrics import score_vectors
from kimi_recursive.track_b.neighbours import Floats
from kimi_recursive.track_b.objectives import build_objective
from kimi_recursive.track_b.sheet import parse_row
from kimi_recursive.track_b.student import build_student
from kimi_recursive.track_b.teacher import load_vectors
from kimi_recursive.track_b.truth import Truth, load_truth

NUM_STEPS = 20


def check_sanity(
    teacher_dir: str | Path, neighbours_path: str | Path, output_path: str | Path
) -> list[dict[str, Any]]:
    """Write which checks passed, and print a warning for each that failed.

    Both objectives run with default hyperparameters, so an edit of the sheet does not repeat the
    checks.
    """
    checks: list[dict[str, Any]] = []

    def check(name: str, measure: Callable[[], tuple[bool, str]]) -> None:
        try:
            passed, value = measure()
        except Exception as error:
            traceback.print_exc()
            passed, value = False, f"{type(error).__name__}: {error}"
        checks.append({"check": name, "passed": bool(passed), "value": value})
        if not passed:
            print(f"warning: sanity check failed: {name}: {value}", file=sys.stderr)

    vectors, truth = load_vectors(teacher_dir), load_truth(neighbours_path)
    everything, train = vectors["database"], vectors["pool"]
    check("vectors have unit length", lambda: _unit_length(everything))
    check("the teacher's own vectors score 1", lambda: _teacher_scores_one(everything, truth))
    check("random vectors score below 0.1", lambda: _random_scores_low(everything, truth))
    for name, settings in _tried(train, truth).items():
        name = f"{NUM_STEPS} steps of {name} lower the loss"
        check(name, lambda settings=settings: _learns(train, truth, settings))
    passed = sum(c["passed"] for c in checks)
    print(f"sanity: {passed} of {len(checks)} checks passed", file=sys.stderr)
    write_json(output_path, {"passed": passed == len(checks), "checks": checks})
    return checks


def _tried(vectors: Floats, truth: Truth) -> dict[str, dict[str, Any]]:
    """Settings for each objective that fit this teacher."""
    shared = {
        "experiment": "sanity",
        "dim": min(128, vectors.shape[1]),
        "k": min(50, truth.train.shape[1]),
        "false_neg_mode": "threshold" if math.isfinite(truth.threshold) else "none",
        "threshold": max(0.8, truth.threshold) if math.isfinite(truth.threshold) else 1.0,
    }
    listwise = {"objective": "listwise", "student": "residual", "init": "random", "batch_size": 16}
    return {
        "infonce": parse_row(shared, "sanity").settings,
        "listwise": parse_row({**shared, **listwise}, "sanity").settings,
    }


def _unit_length(vectors: Floats) -> tuple[bool, str]:
    error = float(np.abs(np.linalg.norm(vectors, axis=1) - 1).max())
    return error < 1e-5, f"off by at most {error:.2g}"


def _score(vectors: Floats, truth: Truth) -> float:
    rows = truth.queries["validation"]
    return float(
        score_vectors(vectors[rows], vectors, rows, truth.relevant["validation"])[0].mean()
    )


def _teacher_scores_one(vectors: Floats, truth: Truth) -> tuple[bool, str]:
    recall = _score(vectors, truth)
    return recall > 0.999, f"recall@10 {recall:.4f}"


def _random_scores_low(vectors: Floats, truth: Truth) -> tuple[bool, str]:
    random = np.random.default_rng(0).standard_normal((len(vectors), 16), dtype=np.float32)
    recall = _score(random / np.linalg.norm(random, axis=1, keepdims=True), truth)
    return recall < 0.1, f"recall@10 {recall:.4f}"


def _learns(vectors: Floats, truth: Truth, settings: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether the mean loss of the last quarter of the steps is below that of the first."""
    student = build_student(settings, vectors, seed=0)
    objective = build_objective(student, vectors, truth, settings, seed=0)
    optimizer = torch.optim.AdamW(student.parameters(), lr=settings["lr"], weight_decay=0.0)
    losses = []
    for _ in range(NUM_STEPS):
        loss, _ = objective(None, 0)  # the same batch
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    quarter = NUM_STEPS // 4
    first, last = np.mean(losses[:quarter]), np.mean(losses[-quarter:])
    return bool(last < first), f"{first:.4g} to {last:.4g}"
