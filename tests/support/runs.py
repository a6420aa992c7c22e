"""A tiny training, and when two runs are the same."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch

from kimi_recursive.training.phases import train_phase
from kimi_recursive.training.settings import PhaseSettings
from kimi_recursive.training.spec import LoadOptions, PhaseSpec, RunFiles

PHASE = {
    "num_steps": 6, "batch_size": 4, "context_length": 16, "lr": 1e-3, "lr_heads": 2e-3,
    "lr_feedback": 3e-2,
    "lr_schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.0, "max_grad_norm": 1.0,
    "own_draft_share": 0.5, "eval_interval": 3, "save_interval": 2, "log_interval": 2,
    "num_validation_windows": 4, "mixed_precision": "no",
}  # fmt: skip
LORA = {"rank": 2, "alpha": 4, "targets": "all-linear"}
SETTINGS = {
    "a": PHASE,
    "b": {**PHASE, "lr_lora": 3e-3, "lora": LORA, "scheduled_sampling": 0.5},
    "c": {
        **PHASE, "lr_lora": 1e-3, "scheduled_sampling": 0.5, "lr_layers": 1e-3,
        "unfreeze_every": 4, "l2_pull": 0.1,
    },
}  # fmt: skip


def train_into(
    folder: Path,
    phase: str,
    settings: Mapping[str, Any],
    parent: Path,
    tokens: Path,
    load: LoadOptions = LoadOptions(),  # noqa: B008, frozen
    **spec: Any,
) -> dict:
    """Train a phase into a folder, with seed 0 unless `spec` says otherwise."""
    given = {"settings": PhaseSettings.from_mapping(settings), "seed": 0, **spec}
    files = RunFiles(
        parent=parent,
        tokens=tokens,
        sidecar=folder / "sidecar",
        logs=folder / "train_logs.parquet",
        summary=folder / "train_summary.json",
        work=folder / "work",
    )
    return train_phase(PhaseSpec(phase, **given), files, load)


def same(logs: pl.DataFrame, other: pl.DataFrame) -> bool:
    return logs.drop("tokens_per_second", strict=False).equals(
        other.drop("tokens_per_second", strict=False)
    )


def same_run(one: Path, other: Path) -> None:
    """Every artefact of two runs is the same, but for times: outputs, checkpoints, metrics."""
    names = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    of_logs = ("work/logs", "work/lock", "work/fingerprint", "work/experiment_metadata")
    names = [n for n in names if not str(n).startswith(of_logs)]
    assert [n for n in names if not (other / n).is_file()] == []
    for name in names:
        a, b = one / name, other / name
        if name.name == "train_logs.parquet":
            assert same(pl.read_parquet(a), pl.read_parquet(b)), name
        elif name.suffix == ".pt":
            assert_equal(*(torch.load(p, weights_only=True) for p in (a, b)))
        elif name.suffix == ".json":
            assert timeless(a) == timeless(b), name
        elif name.parent.name not in ("notes",) or name.suffix == ".jsonl":
            assert a.read_bytes() == b.read_bytes(), name
    best = [json.loads((r / "work/experiment_metadata.json").read_text()) for r in (one, other)]
    for key in ("status", "best_checkpoint_step", "best_metrics", "final_results"):
        assert best[0][key] == best[1][key]


def timeless(path: Path) -> dict:
    values = json.loads(path.read_text())
    values.pop("tokens_per_second", None)
    values.get("metrics", {}).pop("tokens_per_second", None)
    digests = values.get("sha256", {})
    for name in ("train_logs.parquet", "optimizer.pt", "scheduler.pt"):
        digests.pop(name, None)
    return values


def assert_equal(a, b) -> None:
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b
