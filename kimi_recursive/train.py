"""The training phases. Phase A: the sidecar trains, the base is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator

from kimi_recursive.checkpoint import WorkDirectory, file_digest
from kimi_recursive.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.data import WindowSampler, document_windows, load_tokens
from kimi_recursive.evaluate import losses_by_step
from kimi_recursive.files import publishing, versions, write_json, write_parquet
from kimi_recursive.flops import cumulative_training_flops, steps_for_flops
from kimi_recursive.loader import (
    SIDECAR_NAME,
    build_wrapper,
    load_model_with_config,
    save_sidecar,
    sidecar_base_path,
)
from kimi_recursive.loop import LoopSettings, train_loop
from kimi_recursive.losses import DraftRepair
from kimi_recursive.matrix import ARMS, NUMERICS_VERSION


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

    All arms see the same batches, chunks and corruption of a seed. The arm `vanilla_flops` takes as
    many more steps as bring it to the training FLOPs of the recursive arm.

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
    wrapper, _, config = load_model_with_config(
        parent_dir,
        overrides={**(overrides or {}), **ARMS[arm]},
        device=accelerator.device,
        **load_options,
    )
    wrapper.base.requires_grad_(False)
    trainable = {k: p for k, p in wrapper.named_parameters() if p.requires_grad}
    heads = [p for k, p in trainable.items() if k.startswith("boundary.")]
    cells = [p for k, p in trainable.items() if not k.startswith("boundary.")]
    groups = {"sidecar": (cells, settings["lr"]), "heads": (heads, settings["lr_heads"])}
    optimizer = torch.optim.AdamW(
        [{"params": params, "name": name, "lr": lr} for name, (params, lr) in groups.items()],
        betas=(0.9, 0.95),
        weight_decay=settings["weight_decay"],
        fused=True,
    )
    context, width = settings["context_length"], config.chunk_width
    if context % width:
        raise ValueError(
            f"training.{phase}.context_length ({context}) must be a multiple of "
            f"recursive.chunk_width ({width})"
        )
    sampler = WindowSampler(
        load_tokens(tokens_dir, "train"), context + 1, settings["batch_size"], seed
    )
    held_out = load_tokens(tokens_dir, "validation")
    windows = [w for w in document_windows(held_out, context, 2) if len(w.inputs) == context]
    windows = windows[: settings["num_validation_windows"]]
    if not windows:
        raise ValueError(f"{tokens_dir}: no validation document has {context + 1} tokens")

    def batch(step: int) -> torch.Tensor:
        return torch.from_numpy(sampler.batch(step)).to(accelerator.device)

    own_share, num_steps = settings["own_draft_share"], settings["num_steps"]
    if arm == "vanilla_flops":
        parent = RecursiveConfig.from_file(parent_dir / CONFIG_NAME).to_dict()
        recursive = build_wrapper(
            wrapper.base, RecursiveConfig.from_dict({**parent, **(overrides or {})})
        )
        reference = DraftRepair(recursive, num_steps, own_share, seed)
        budget = cumulative_training_flops(reference, batch(0), num_steps)[-1]
        longest = DraftRepair(wrapper, num_steps, own_share, seed)
        # A pass of the recursive arm costs at least as much as one of this arm.
        most = num_steps * (2 + recursive.config.max_inner_steps)
        num_steps = steps_for_flops(cumulative_training_flops(longest, batch(0), most), budget)
    objective = DraftRepair(wrapper, num_steps, own_share, seed)
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
        "config": config.to_dict(),
        "parent": file_digest(parent_dir / SIDECAR_NAME),
        "tokens": file_digest(tokens_dir / "train.parquet"),
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
                lr={name: lr for name, (_, lr) in groups.items()},
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
            save_sidecar(wrapper, folder, sidecar_base_path(parent_dir / SIDECAR_NAME))
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
