"""Whether a run can be repeated: a run and its repeat, compared bit for bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from kimi_recursive.evaluation.scores import largest_difference
from kimi_recursive.files import file_digest, read_safetensors, write_json
from kimi_recursive.layout import SIDECAR_NAME


def compare_repeat(
    key: str,
    sidecars: Sequence[Path],
    logs: Sequence[str | Path],
    documents: Sequence[str | Path],
    output_path: str | Path,
) -> dict[str, Any]:
    """Whether a run and its repeat, made from the same config, gave the same numbers.

    Args:
        key: Of the run.
        sidecars, logs, documents: Of the run and of its repeat: sidecar directories,
            `train_logs.parquet`, `<name>_documents.parquet`.

    Returns: what is written to `output_path`: whether all is `identical`, and the largest
        differences of weights, of training losses, and of documents' losses.
    """
    first, second = ({p.name: p for p in d.rglob("*") if p.is_file()} for d in sidecars)
    files_identical = first.keys() == second.keys() and all(
        file_digest(first[name]) == file_digest(second[name]) for name in first
    )
    weights = [read_safetensors(d / SIDECAR_NAME)[0] for d in sidecars]
    tables = [pl.read_parquet(path).drop("tokens_per_second") for path in logs]
    scores = [pl.read_parquet(path) for path in documents]
    differences = {
        "weights": max(float((weights[0][k] - weights[1][k]).abs().max()) for k in weights[0]),
        "training_loss": largest_difference(tables[0]["loss"], tables[1]["loss"]),
        "document_loss": largest_difference(scores[0]["loss_sum"], scores[1]["loss_sum"]),
    }
    result = {
        "run": key,
        "identical": files_identical
        and tables[0].equals(tables[1])
        and scores[0].equals(scores[1]),
        "sidecar_sha256": file_digest(sidecars[0] / SIDECAR_NAME),
        "files_identical": files_identical,
        "num_steps": tables[0].select(pl.col("step").max()).item(),
        "num_documents": scores[0]["document_id"].n_unique(),
        "max_differences": differences,
    }
    write_json(output_path, result)
    return result
