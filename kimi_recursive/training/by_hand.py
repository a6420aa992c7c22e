"""One experiment by hand, outside the workflow: `kimi-recursive run-experiment`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from tqdm import tqdm

from kimi_recursive.data.tokens import token_counts
from kimi_recursive.data.windows import IGNORED
from kimi_recursive.evaluation.scores import losses_by_step
from kimi_recursive.files import NUMERICS_VERSION, write_parquet
from kimi_recursive.layout import SIDECAR_NAME, RunFolder
from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig, get_phase_a_config
from kimi_recursive.model.digests import model_digest
from kimi_recursive.model.loading import load_model_with_config
from kimi_recursive.model.sidecar import base_of
from kimi_recursive.processes.signals import Interrupted, stop_signals
from kimi_recursive.training.batches import Batches, check_windows, token_digests
from kimi_recursive.training.checkpoint import WorkDirectory
from kimi_recursive.training.experiment import METADATA_NAME, ExperimentTracker
from kimi_recursive.training.objective import build_objective
from kimi_recursive.training.phases import train_phase
from kimi_recursive.training.spec import LoadOptions, PhaseSpec, Record, RunFiles


def starting_config(model_path: str | Path, given: RecursiveConfig | None) -> RecursiveConfig:
    """The config that is given; else the model's own, or that of phase A for a base."""
    if given is not None:
        return given
    if not (Path(model_path) / SIDECAR_NAME).is_file():
        return get_phase_a_config()
    return RecursiveConfig.from_file(Path(model_path) / CONFIG_NAME)


def run_experiment(
    spec: PhaseSpec,
    model_path: str | Path,
    tokens_dir: Path,
    directory: Path,
    load: LoadOptions,
    record: Record,
) -> None:
    """Train a phase, or run the baseline when `spec.config` disables recursion. An experiment that
    was cut off is continued.

    Args:
        spec: With a config (`starting_config`).
        directory: The experiment directory.

    Raises:
        ValueError: bad settings or inputs, another experiment in the directory, or a diverged run.
    """
    assert spec.config is not None, "the config is chosen before"
    ours = ("fingerprint.json", METADATA_NAME)
    foreign = directory.exists() and not any((directory / file).is_file() for file in ours)
    if foreign and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"{directory}: exists and holds no experiment; choose another name")
    settings = spec.settings
    if settings.warmup_steps > settings.num_steps:
        raise ValueError(
            f"warmup_steps must be at most num_steps ({settings.num_steps}), "
            f"got {settings.warmup_steps}"
        )
    files = RunFiles(
        parent=model_path,
        tokens=tokens_dir,
        sidecar=RunFolder(directory).sidecar,
        logs=RunFolder(directory).logs,
        summary=RunFolder(directory).summary,
        work=directory,
    )
    run = train_phase if spec.config.recursive_enabled else run_baseline
    run(spec, files, load, record)


@torch.no_grad()
def run_baseline(spec: PhaseSpec, files: RunFiles, load: LoadOptions, record: Record) -> None:
    """Score the base on the chunks that a training with the same settings and seed would see, and
    on the validation windows. Nothing is trained and there is no checkpoint; the learning rate on
    record is the initial one, for reference.

    Writes the logs and metrics: step, loss of the base on the step's chunks, lr_sidecar, tokens,
    and validation_loss_step_0 at the first and the last step.

    Raises:
        ValueError: bad settings or inputs, or another experiment in that directory.
    """
    settings, config = spec.settings, spec.config
    assert config is not None and not config.recursive_enabled
    wrapper, _, _ = load_model_with_config(files.parent, config=config, **load.keywords())
    context, num_steps = settings.context_length, settings.num_steps
    check_windows(wrapper, context)
    batches = Batches.of_phase(files.tokens, settings, spec.seed, config.chunk_width)
    objective = build_objective(wrapper, num_steps, settings, spec.seed)
    fingerprint = {
        "baseline": settings.numeric(),
        "seed": spec.seed,
        "config": config.to_dict(),
        "load": load.numeric(),
        "base": model_digest(base_of(files.parent), load.revision),
        "tokens": token_digests(files.tokens),
        "numerics": NUMERICS_VERSION,
    }
    rows: list[dict[str, Any]] = []
    with (
        stop_signals() as arrived,
        WorkDirectory(files.work, fingerprint, refuse_others=record.refuse_others),
        ExperimentTracker(
            files.work,
            record.name,
            record.description,
            config,
            {"phase": None, "seed": spec.seed, **settings.to_mapping()},
            record.paths(files.tokens, model_path=files.parent),
            token_counts(files.tokens),
            record.tracking,
        ) as tracker,
    ):
        tracker.start_afresh()
        num_tokens = 0
        [validation] = losses_by_step(wrapper, batches.validation, settings.batch_size)
        for step in tqdm(
            range(num_steps), desc="baseline", unit="step", mininterval=2.0, disable=None
        ):
            if arrived:
                raise Interrupted(step)
            batch = batches.at(step, wrapper.device)
            chunk, gold = objective.first_pass(batch, objective.draw(batch, step).start)
            targets = gold.targets
            loss = F.cross_entropy(
                chunk.logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED
            )
            num_tokens += int((targets != IGNORED).sum())
            rows.append(
                {
                    "step": step + 1,
                    "loss": float(loss),
                    "lr_sidecar": float(settings.lr),
                    "tokens": num_tokens,
                    "validation_loss_step_0": validation if step in (0, num_steps - 1) else None,
                }
            )
            if (step + 1) % settings.log_interval == 0 or rows[-1]["validation_loss_step_0"]:
                tracker.save_metrics(step + 1, rows[-1])
        logs = pl.DataFrame(rows, infer_schema_length=None)
        write_parquet(files.logs, logs)
        tracker.finish(
            {
                "loss": float(logs.select(pl.col("loss").mean()).item()),
                "validation_loss": validation,
                "validation_perplexity": float(np.exp(validation)),
            }
        )
