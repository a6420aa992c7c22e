"""Measures time and memory of a matrix on this machine, from a few steps with random weights.

The workflow's own functions run on a base with the config's shapes and on random tokens, each phase
in its own process, as in a job of the workflow.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from accelerate.utils import get_max_memory
from transformers import AutoModelForCausalLM

from kimi_recursive.evaluation.settings import EvaluationSettings, EvaluationSpec
from kimi_recursive.evaluation.stage import evaluate_stage
from kimi_recursive.layout import EvaluationFiles
from kimi_recursive.matrix.settings import MODEL_KEYS, Config
from kimi_recursive.plan.estimate import base_shape
from kimi_recursive.training.phases import train_phase
from kimi_recursive.training.settings import PhaseSettings
from kimi_recursive.training.spec import PhaseSpec, RunFiles
from kimi_recursive.training.surgery import insert_cells

NUM_STEPS = 16
HALF = NUM_STEPS // 2  # a validation follows after so many steps, and another at the end


def measure(config: Mapping[str, Any], planned: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Run a few steps of the evaluation and of each phase, for the recursive arm.

    Args:
        planned: The `runs` of `plan`.

    Returns: for `evaluation` and each phase, `tokens_per_second` (scored tokens; or trained ones,
        with validations included) and `resident_bytes`, the most memory that the process had; for
        a phase also `minutes`, the time of the whole run.

    Raises:
        ValueError: the machine does not have enough memory.
    """
    for name, run in planned.items():
        needed = run["weight_bytes"] + run["optimizer_bytes"] + run["peak_bytes"]
        free = get_max_memory()["cpu"]
        if needed > free:
            raise ValueError(
                f"--measure: {name} needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} are free"
            )
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in jobs of the workflow
    with tempfile.TemporaryDirectory(prefix="kimi-recursive-") as scratch:
        folder = Path(scratch)
        _alone(_make_inputs, config, folder)
        found = {"evaluation": _alone(_evaluate, config, folder)}
        for phase in config["phases"]:
            print(f"measuring phase {phase}", file=sys.stderr)
            found[phase] = _alone(_train, config, folder, phase)
    return found


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as pool:
        return pool.submit(function, *arguments).result()


def _make_inputs(config: Mapping[str, Any], folder: Path) -> None:
    """Write a base, a sidecar and tokens."""
    base_config, dtype = base_shape(config)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(base_config, dtype=dtype)
    base.save_pretrained(folder / "base")
    recursive = Config.from_mapping(config).recursive_part(MODEL_KEYS)
    insert_cells(folder / "base", recursive, 0, folder / "surgery")
    lengths = [run["context_length"] for run in _settings(config)]
    windows = [run.get("num_validation_windows", 0) for run in _settings(config)]
    scored = 6 * config["evaluation"]["batch_size"]
    sizes = {"train": 32, "validation": max(windows), "test": scored}
    generator = np.random.default_rng(0)
    for split, num_documents in sizes.items():
        shape = (num_documents, max(lengths) + 1)
        tokens = generator.integers(base_config.vocab_size, size=shape, dtype=np.int32)
        table = {
            "document_id": [str(i) for i in range(num_documents)],
            "tokens": tokens.tolist(),
            "num_tokens": [shape[1]] * num_documents,
        }
        schema = {"tokens": pl.List(pl.Int32), "num_tokens": pl.Int64}
        frame = pl.DataFrame(table, schema_overrides=schema)
        (folder / "tokens").mkdir(exist_ok=True)
        frame.write_parquet(folder / f"tokens/{split}.parquet")


def _settings(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [config["evaluation"], *(config["training"][phase] for phase in config["phases"])]


def _evaluate(config: Mapping[str, Any], folder: Path) -> dict[str, float]:
    few = {"prompts": [], "max_windows_per_document": 1}
    settings = EvaluationSettings.from_mapping({**config["evaluation"], **few})
    files = EvaluationFiles(folder, "after_surgery")
    spec = EvaluationSpec(files.name, settings)
    results = evaluate_stage(spec, folder / "surgery", folder / "tokens", files)
    rate = results["throughput"]["evaluated_tokens_per_second"]
    return {"tokens_per_second": rate, "resident_bytes": _resident()}


def _train(config: Mapping[str, Any], folder: Path, phase: str) -> dict[str, float]:
    settings = config["training"][phase]
    few = {"num_steps": NUM_STEPS, "warmup_steps": 1, "eval_interval": HALF, "save_interval": HALF}
    parent = "surgery" if phase == config["phases"][0] else chr(ord(phase) - 1)
    logs = folder / f"{phase}.parquet"
    train_phase(
        PhaseSpec(
            phase,
            PhaseSettings.from_mapping({**settings, **few}),
            seed=0,
            overrides=Config.from_mapping(config).phase_overrides(phase),
        ),
        RunFiles(
            parent=folder / parent,
            tokens=folder / "tokens",
            sidecar=folder / phase,
            logs=logs,
            summary=folder / f"{phase}.json",
            work=folder / f"{phase}.work",
        ),
    )
    return {**predict(pl.read_parquet(logs), settings), "resident_bytes": _resident()}


def predict(logs: pl.DataFrame, settings: Mapping[str, Any]) -> dict[str, float]:
    """`tokens_per_second` and `minutes` of a whole run, from the log of its first `NUM_STEPS`."""
    logs = logs.filter(pl.col("step") > 0)
    clock = np.concatenate([[0.0], logs["tokens"] / logs["tokens_per_second"]])
    seconds = np.diff(clock)  # of each step; the step after a validation includes it
    step = float(np.delete(seconds, HALF).mean())
    validation = max(0.0, float(seconds[HALF]) - step)
    whole = settings["num_steps"] * (step + validation / settings["eval_interval"])
    tokens = settings["num_steps"] * logs["tokens"][-1] / NUM_STEPS
    return {"tokens_per_second": tokens / whole, "minutes": whole / 60}


def _resident() -> int:
    """The most bytes that this process has had in memory; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])
