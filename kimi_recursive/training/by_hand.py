"""One experiment by hand, outside the workflow: `kimi-recursive run-experiment`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kimi_recursive.data.tokens import load_tokens
from kimi_recursive.data.windows import WindowSampler, validation_windows
from kimi_recursive.evaluation.scores import losses_by_step
from kimi_recursive.files import NUMERICS_VERSION, write_parquet
from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig, get_phase_a_config
from kimi_recursive.model.loading import load_model_with_config, numeric
from kimi_recursive.model.sidecar import SIDECAR_NAME, base_of
from kimi_recursive.processes.signals import Interrupted, stop_signals
from kimi_recursive.training.checkpoint import WorkDirectory, model_digest, token_digests
from kimi_recursive.training.experiment import METADATA_NAME, ExperimentTracker
from kimi_recursive.training.objective import DraftRepair
from kimi_recursive.training.phases import check_windows, train_phase
from kimi_recursive.training.settings import NEUTRAL_KEYS


def run_experiment(
    name: str,
    description: str,
    model_path: str,
    config: RecursiveConfig | None,
    phase: str,
    settings: Mapping[str, Any],
    seed: int,
    tokens_dir: Path,
    output_dir: Path,
    arm: str = "recursive",
    num_kept: int | None = None,
    force: bool = False,
    inputs: Mapping[str, Any] | None = None,
    **load_options: Any,
) -> Path:
    """Train a phase, or with recursion disabled in `config` run the baseline, into
    `output_dir/name`; an experiment that was cut off goes on where it was.

    Args:
        config: By default the model's own; for a base that of phase A.
        settings: As `training.<phase>` of the workflow config. A `context_length` of None is four
            chunks.
        num_kept: Checkpoints to keep beside the best; None for all.
        force: Start afresh where another experiment of that name is.
        inputs: Further paths for the record.
        load_options: Passed on to `load_model_with_config`.

    Returns: the experiment directory.

    Raises:
        ValueError: bad settings or inputs, another experiment of that name, or a diverged run.
    """
    directory = output_dir / name
    ours = ("fingerprint.json", METADATA_NAME)
    foreign = directory.exists() and not any((directory / file).is_file() for file in ours)
    if foreign and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: is there and is no experiment; choose another name")
    if config is None and not (Path(model_path) / SIDECAR_NAME).is_file():
        config = get_phase_a_config()
    width = (config or RecursiveConfig.from_file(Path(model_path) / CONFIG_NAME)).chunk_width
    settings = {**settings, "context_length": settings["context_length"] or 4 * width}
    if settings["warmup_steps"] > settings["num_steps"]:
        raise ValueError(
            f"warmup_steps must be at most num_steps ({settings['num_steps']}), "
            f"got {settings['warmup_steps']}"
        )
    options = {"refuse_others": not force, "inputs": inputs, **load_options}
    if config is not None and not config.recursive_enabled:
        run_baseline(
            directory, name, description, model_path, config, settings, seed, tokens_dir, **options
        )
        return directory
    train_phase(
        phase,
        settings,
        seed,
        model_path,
        tokens_dir,
        output_dir=directory / "sidecar",
        logs_path=directory / "train_logs.parquet",
        summary_path=directory / "train_summary.json",
        work_dir=directory,
        arm=arm,
        config=config,
        name=name,
        description=description,
        num_kept=num_kept,
        **options,
    )
    return directory


@torch.no_grad()
def run_baseline(
    directory: Path,
    name: str,
    description: str,
    model_path: str,
    config: RecursiveConfig,
    settings: Mapping[str, Any],
    seed: int,
    tokens_dir: Path,
    refuse_others: bool = False,
    inputs: Mapping[str, Any] | None = None,
    **load_options: Any,
) -> None:
    """The base on the chunks that a training with the same settings and seed would see, and on the
    validation windows. Nothing is trained and there is no checkpoint; the learning rate on record
    is the initial one, for reference.

    Writes `train_logs.parquet` and metrics: step, loss of the base on the step's chunks,
    lr_sidecar, tokens, and validation_loss_step_0 at the first and the last step.

    Raises:
        ValueError: bad settings or inputs, or another experiment in that directory.
    """
    wrapper, _, _ = load_model_with_config(model_path, config=config, **load_options)
    context, num_steps = settings["context_length"], settings["num_steps"]
    check_windows(wrapper, context)
    sampler = WindowSampler(
        load_tokens(tokens_dir, "train"), context + 1, settings["batch_size"], seed
    )
    windows = validation_windows(tokens_dir, context, settings["num_validation_windows"])
    objective = DraftRepair(wrapper, num_steps, settings["own_draft_share"], seed)
    fingerprint = {
        "baseline": {k: v for k, v in settings.items() if k not in NEUTRAL_KEYS},
        "seed": seed,
        "config": config.to_dict(),
        "load": numeric(load_options),
        "base": model_digest(base_of(model_path), load_options.get("revision")),
        "tokens": token_digests(tokens_dir),
        "numerics": NUMERICS_VERSION,
    }
    rows: list[dict[str, Any]] = []
    with (
        stop_signals() as arrived,
        WorkDirectory(directory, fingerprint, refuse_others=refuse_others),
        ExperimentTracker(
            directory,
            name,
            description,
            config,
            {"phase": None, "seed": seed, **settings},
            {"model_path": model_path, "tokens": tokens_dir, **(inputs or {})},
        ) as tracker,
    ):
        tracker.start_afresh()
        [validation] = losses_by_step(wrapper, windows, settings["batch_size"])
        for step in tqdm(range(num_steps), desc="baseline", unit="step", mininterval=2.0):
            if arrived:
                raise Interrupted(step)
            batch = torch.from_numpy(sampler.batch(step)).to(wrapper.device)
            start = objective.draw(context, step).start
            gold = batch[:, start : start + config.chunk_width + 1]
            prefix = wrapper.encode(batch[:, :start], wrapper.new_cache())
            logits = wrapper.start_chunk(gold[:, :-1], prefix).logits
            loss = F.cross_entropy(logits.float().flatten(0, 1), gold[:, 1:].flatten())
            rows.append(
                {
                    "step": step + 1,
                    "loss": float(loss),
                    "lr_sidecar": float(settings["lr"]),
                    "tokens": (step + 1) * gold[:, 1:].numel(),
                    "validation_loss_step_0": validation if step in (0, num_steps - 1) else None,
                }
            )
            if (step + 1) % settings["log_interval"] == 0 or rows[-1]["validation_loss_step_0"]:
                tracker.save_metrics(step + 1, rows[-1])
        logs = pl.DataFrame(rows, infer_schema_length=None)
        write_parquet(directory / "train_logs.parquet", logs)
        tracker.finish(
            {
                "loss": float(logs["loss"].mean()),
                "validation_loss": validation,
                "validation_perplexity": float(np.exp(validation)),
            }
        )
