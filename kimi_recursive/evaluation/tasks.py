"""Tasks of lm-evaluation-harness, asked of one model at one inner step, and kept by sample."""

from __future__ import annotations

import importlib.metadata
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from lm_eval.api import metrics
from lm_eval.api.model import LM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks.manager import TaskDict

from kimi_recursive.evaluation.harness import RecursiveLM
from kimi_recursive.evaluation.outcomes import SAMPLE_COLUMNS, Statistic
from kimi_recursive.evaluation.settings import TaskSettings, TaskSpec
from kimi_recursive.evaluation.task_names import find_tasks
from kimi_recursive.files import (
    NUMERICS_VERSION,
    file_digest,
    git_state,
    read_json_object,
    versions,
    write_json,
    write_parquet,
)
from kimi_recursive.layout import SIDECAR_NAME, TaskFiles
from kimi_recursive.model.config import get_baseline_config
from kimi_recursive.model.digests import model_digest, sidecar_digests
from kimi_recursive.model.loading import numeric
from kimi_recursive.model.placement import placed
from kimi_recursive.model.sidecar import Sidecar, base_of
from kimi_recursive.published import Published

# What the harness makes of the outcomes of all samples. For any other function there is no outcome
# of a sample that would say which of two models did better on it.
STATISTICS = {
    metrics.mean: Statistic.MEAN,
    metrics.perplexity: Statistic.PERPLEXITY,
    metrics.weighted_perplexity: Statistic.PERPLEXITY,
    metrics.bits_per_byte: Statistic.BITS,
}
RESAMPLES = 1000  # of the harness, for standard errors that only it can give


def evaluate_tasks(
    spec: TaskSpec,
    model_path: str | Path,
    corpus: str | Path,
    task_files: Sequence[str | Path],
    files: TaskFiles,
    **load_options: Any,
) -> dict[str, Any]:
    """Ask one model the tasks at one inner step; write scores and the outcome of each sample.

    Generation commits what the refined model verifies, whatever `recursive.commit` says: at a given
    inner step nothing else is defined. Scores are kept in `files.published`, and taken from there
    if they were made of the same model, tasks and text.

    Args:
        corpus: Held-out documents, which tasks may read (the keyword `corpus` of their datasets).
        task_files: Those of `include_path`.
        files: What to write.
        load_options: Passed on to `load_base`; the device is training's by default.

    Returns: what is written to `files.results`; `scores` has an entry for each task and metric.

    Raises:
        ValueError: an unknown task, or from loading or asking.
    """
    sidecar = Sidecar.find(model_path)
    config = (sidecar.config() if sidecar else get_baseline_config()).to_dict()
    fingerprint = {
        "base": model_digest(base_of(model_path)),
        "sidecar": sidecar_digests(model_path),
        "step": spec.step,
        "tasks": spec.settings.numeric(),
        "task_files": [file_digest(path) for path in task_files],
        "corpus": file_digest(corpus),
        "load": numeric(load_options),
        "numerics": NUMERICS_VERSION,
    }
    about = {
        "versions": versions() | {"lm_eval": importlib.metadata.version("lm_eval")},
        **git_state(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    published = Published(files.published, (files.results, files.samples), fingerprint)
    if published.fits():
        published.restore()
        kept = read_json_object(files.results)
        scores, about = kept["scores"], {key: kept[key] for key in about}
        print(f"evaluate_tasks: the scores are taken from {published.folder}", file=sys.stderr)
    else:
        place = placed(load_options)
        model = cast("Any", RecursiveLM)(
            path=str(model_path),
            num_steps=spec.step,
            batch_size=spec.settings.batch_size,
            max_length=spec.settings.max_length,
            **place | {"device": str(place.get("device", "cpu"))},
        )
        scores, samples = ask(model, spec.settings, corpus)
        write_parquet(files.samples, samples)
    results = {
        "stage": spec.stage,
        "step": spec.step,
        "model_path": str(model_path),
        "sidecar_sha256": fingerprint["sidecar"].get(SIDECAR_NAME),
        "config": config,
        "tasks": spec.settings.numeric(),
        "upstream": spec.upstream,
        "scores": scores,
        **about,
    }
    write_json(files.results, results)
    published.keep()
    return results


def ask(
    model: LM, settings: TaskSettings, corpus: str | Path
) -> tuple[list[dict[str, Any]], pl.DataFrame]:
    """Ask a model all samples of the tasks.

    Returns:
        For each task and metric: task, metric (with the filter of the answers behind it, where
        there is one), value and stderr (None where there is none), num_samples, higher_is_better
        (None where the task does not say) and statistic (None where a sample has no outcome of its
        own). And the outcomes, `SAMPLE_COLUMNS`: sample is its number and a digest of its text.
    """
    os.environ["DISABLE_MULTIPROC"] = "1"  # the harness would resample in a process for each core
    loaded = _load(settings, corpus)
    found: Any = evaluate(model, loaded, limit=settings.limit, bootstrap_iters=RESAMPLES)
    scores, outcomes = [], []
    for name, task in loaded["tasks"].items():
        higher: Mapping[str, bool | None] = task.higher_is_better() or {}
        for key, value in found["results"][name].items():
            metric, _, answers = key.partition(",")
            if not answers or metric.endswith("_stderr"):
                continue
            rows = [s for s in found["samples"][name] if s["filter"] == answers and metric in s]
            statistic = STATISTICS.get((task.aggregation() or {}).get(metric, metrics.mean))
            pairs = statistic and _outcomes([row[metric] for row in rows])
            stderr = found["results"][name].get(f"{metric}_stderr,{answers}")
            score = {
                "task": name,
                "metric": metric if answers == "none" else f"{metric}.{answers}",
                "value": _finite(value),
                "stderr": _finite(stderr),
                "num_samples": len(rows),
                "higher_is_better": higher.get(metric),
                "statistic": statistic if pairs else None,
            }
            if statistic and pairs:
                score["stderr"] = _finite(statistic.score(*zip(*pairs, strict=True))[1])
                outcomes += [
                    (name, score["metric"], f"{row['doc_id']} {row['doc_hash'][:16]}", *pair)
                    for row, pair in zip(rows, pairs, strict=True)
                ]
            scores.append(score)
    types = [pl.String, pl.String, pl.String, pl.Float64, pl.Float64]
    schema = list(zip(SAMPLE_COLUMNS, types, strict=True))
    return scores, pl.DataFrame(outcomes, schema=schema, orient="row")


def _load(settings: TaskSettings, corpus: str | Path) -> TaskDict:
    """The tasks, as the command of the harness loads them: its seeds, since a task may shuffle, and
    its rule that a task without examples stays so."""
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    loaded = find_tasks(settings, corpus).load(list(settings.names))
    for task in loaded["tasks"].values():
        own = task.get_config("num_fewshot")
        if own is None or (own and settings.num_fewshot is not None):
            task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
    return loaded


def _outcomes(values: Sequence[Any]) -> list[tuple[float, float]] | None:
    """Outcome and weight of each sample; None where they are no finite numbers, or fewer than two.
    The harness gives a log-likelihood with the words or bytes that it is of."""
    try:
        pairs = [v if isinstance(v, tuple) else (v, 1.0) for v in values]
        found = [(float(outcome), float(weight)) for outcome, weight in pairs]
    except (TypeError, ValueError):
        return None
    finite = all(math.isfinite(outcome) and weight > 0 for outcome, weight in found)
    return found if finite and len(found) > 1 else None


def _finite(value: Any) -> float | None:
    """A number as JSON has it: the harness writes N/A, and a perplexity may overflow."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
