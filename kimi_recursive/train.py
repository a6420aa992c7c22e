"""The training phases. Phase A: the sidecar trains, the base is frozen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator

from kimi_recursive.checkpoint import WorkDirectory, file_digest, model_digest
from kimi_recursive.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.data import WindowSampler, load_tokens, validation_windows
from kimi_recursive.evaluate import losses_by_step
from kimi_recursive.files import publishing, versions, write_json, write_parquet
from kimi_recursive.flops import cumulative_training_flops, steps_for_flops
from kimi_recursive.loader import (
    SIDECAR_NAME,
    base_of,
    build_wrapper,
    check_context,
    load_model_with_config,
    save_sidecar,
)
from kimi_recursive.loop import LoopSettings, train_loop
from kimi_recursive.losses import DraftRepair
from kimi_recursive.matrix import ARMS, NUMERICS_VERSION
from kimi_recursive.model import ChunkRefineWrapper


def train_phase(
    phase: str,
    settings: Mapping[str, Any],
    seed: int,
    parent_dir: Path,
    tokens_dir: Path,
    output_dir: Path,
    logs_path: Path,
    summary_path: Path,
    work_dir: Path,
    arm: str = "recursive",
    overrides: Mapping[str, Any] | None = None,
    **load_options: Any,
) -> dict[str, Any]:
    """Train one phase from the sidecar in `parent_dir` and publish the best one.

    All arms of a seed see the same batches and chunks in the same order. The arm `vanilla_flops`
    takes as many more steps as bring it to the training FLOPs of the recursive arm, with its
    learning rate and corruption scheduled over all of them; `vanilla` also shares the corruption.

    Args:
        phase: `a`.
        settings: The `training.<phase>` subtree of the workflow config.
        seed: Of data order, chunk positions and corruption.
        output_dir: Becomes a sidecar directory; best by validation loss at step K.
        logs_path: Parquet, one row a step (columns: README of `results/`).
        summary_path: JSON: parameters, tokens, FLOPs, best step, validation loss by inner step.
        arm: One of `matrix.ARMS`.
        overrides: Parameters of `RecursiveConfig` to change in the parent's config.
        load_options: Passed on to `load_model_with_config`.

    Raises:
        ValueError: bad settings or inputs, or a diverged run.
    """
    if phase != "a":
        raise ValueError(f"phase must be 'a', got {phase!r}")
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}")
    accelerator = Accelerator(mixed_precision=settings["mixed_precision"])
    parent = RecursiveConfig.from_file(parent_dir / CONFIG_NAME)
    reference = RecursiveConfig.from_dict({**parent.to_dict(), **(overrides or {})})
    wrapper, _, config = load_model_with_config(
        parent_dir,
        config=dataclasses.replace(reference, **ARMS[arm]),
        device=accelerator.device,
        **load_options,
    )
    wrapper.base.requires_grad_(False)
    trainable = {k: p for k, p in wrapper.named_parameters() if p.requires_grad}
    rates, optimizer = _optimizer(trainable, settings)
    context, width = settings["context_length"], config.chunk_width
    if context % width:
        raise ValueError(
            f"training.{phase}.context_length ({context}) must be a multiple of "
            f"recursive.chunk_width ({width})"
        )
    check_context(wrapper.base, context, f"training.{phase}.context_length")
    train = load_tokens(tokens_dir, "train")
    sampler = WindowSampler(train, context + 1, settings["batch_size"], seed)
    windows = validation_windows(tokens_dir, context, settings["num_validation_windows"])

    def batch(step: int) -> torch.Tensor:
        return torch.from_numpy(sampler.batch(step)).to(accelerator.device)

    def objective_of(model: ChunkRefineWrapper, num_steps: int) -> DraftRepair:
        return DraftRepair(model, num_steps, settings["own_draft_share"], seed)

    num_steps = settings["num_steps"]
    if arm == "vanilla_flops":
        recursive = build_wrapper(wrapper.base, reference)
        budget = cumulative_training_flops(objective_of(recursive, num_steps), batch(0), num_steps)[
            -1
        ]
        # One pass of this arm costs no less than one of the recursive arm's.
        most = num_steps * (2 + reference.max_inner_steps)
        own = cumulative_training_flops(objective_of(wrapper, num_steps), batch(0), most)
        num_steps = steps_for_flops(own, budget)
    objective = objective_of(wrapper, num_steps)
    training_flops = cumulative_training_flops(objective, batch(0), num_steps)[-1]
    objective, optimizer = accelerator.prepare(objective, optimizer)

    def validate() -> dict[str, float]:
        wrapper.eval()
        by_step = losses_by_step(wrapper, windows, settings["batch_size"])
        wrapper.train()
        return {f"validation_loss_step_{t}": float(x) for t, x in enumerate(by_step)}

    fingerprint = {
        "phase": phase,
        "arm": arm,
        "settings": settings,
        "seed": seed,
        "num_steps": num_steps,
        "config": config.to_dict(),
        "load": load_options,
        "base": model_digest(base_of(parent_dir)),
        "parent": file_digest(parent_dir / SIDECAR_NAME),
        "tokens": {s: file_digest(tokens_dir / f"{s}.parquet") for s in ("train", "validation")},
        "numerics": NUMERICS_VERSION,
    }
    wrapper.train()
    with WorkDirectory(work_dir, fingerprint) as work:
        result = train_loop(
            objective=objective,
            trainable=trainable,
            optimizer=optimizer,
            settings=LoopSettings(
                num_steps=num_steps,
                lr=rates,
                warmup_steps=settings["warmup_steps"],
                lr_schedule=settings["lr_schedule"],
                max_grad_norm=settings["max_grad_norm"],
                eval_interval=settings["eval_interval"],
                save_interval=settings["save_interval"],
            ),
            batch=batch,
            validate=validate,
            watch=f"validation_loss_step_{config.max_inner_steps}",
            work=work,
            accelerator=accelerator,
            description=f"train {arm} {phase} seed {seed}",
        )
        with publishing(output_dir) as folder:
            save_sidecar(wrapper, folder, base_of(parent_dir))
        write_parquet(logs_path, result.logs)
        summary = {
            "arm": arm,
            "phase": phase,
            "seed": seed,
            "num_steps": num_steps,
            "training_flops": training_flops,
            "training_tokens": int(result.logs["tokens"][-1]),
            "num_trainable_parameters": sum(p.numel() for p in trainable.values()),
            "best_step": result.best_step,
            "best_validation_loss": result.best_metric,
            "validation": result.logs.filter(pl.col("validation_loss_step_0").is_not_null())
            .select("step", pl.col("^validation_loss_step_.*$"))
            .to_dicts(),
            "settings": dict(settings),
            "config": config.to_dict(),
            "versions": versions(),
        }
        write_json(summary_path, summary)
    return summary


def _optimizer(
    trainable: Mapping[str, torch.nn.Parameter], settings: Mapping[str, Any]
) -> tuple[dict[str, float], torch.optim.Optimizer]:
    """Peak learning rates by group, and AdamW with a group for the boundary head and one for the
    rest of the sidecar."""
    rates = {"sidecar": settings["lr"], "heads": settings["lr_heads"]}
    members: dict[str, list[torch.nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in trainable.items():
        members["heads" if name.startswith("boundary.") else "sidecar"].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": members[name], "name": name, "lr": lr} for name, lr in rates.items()],
        betas=(0.9, 0.95),
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    return rates, optimizer
