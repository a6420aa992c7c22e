"""The training phases, each from the one before.

A: the sidecar trains, the base is frozen. B: LoRA on the top third of the base's layers joins.
C: every n-th layer of the base joins, pulled to its pretrained weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import polars as pl
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from kimi_recursive.data.tokens import load_tokens
from kimi_recursive.data.windows import Window, WindowSampler, validation_windows
from kimi_recursive.evaluation.scores import losses_by_step
from kimi_recursive.files import (
    NUMERICS_VERSION,
    file_digest,
    publishing,
    versions,
    write_json,
    write_parquet,
)
from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.model.loading import (
    build_wrapper,
    check_context,
    load_model_with_config,
    numeric,
)
from kimi_recursive.model.sidecar import (
    SIDECAR_NAME,
    base_of,
    load_sidecar,
    save_sidecar,
    sidecar_facts,
)
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.processes import distributed
from kimi_recursive.processes.signals import stop_signals
from kimi_recursive.training.arms import ARMS, PHASES
from kimi_recursive.training.budget import cumulative_training_flops, steps_for_flops
from kimi_recursive.training.checkpoint import NUM_KEPT, WorkDirectory, model_digest, token_digests
from kimi_recursive.training.experiment import ExperimentTracker
from kimi_recursive.training.loop import LoopSettings, train_loop
from kimi_recursive.training.objective import DraftRepair
from kimi_recursive.training.settings import NEUTRAL_KEYS

SAMPLE_PROMPT_TOKENS, SAMPLE_NEW_TOKENS = 12, 24
LOOP_KEYS = ("warmup_steps", "lr_schedule", "max_grad_norm", "eval_interval", *NEUTRAL_KEYS)
Groups = dict[str, dict[str, nn.Parameter]]


@stop_signals()
def train_phase(
    phase: str,
    settings: Mapping[str, Any],
    seed: int,
    parent_dir: str | Path,
    tokens_dir: Path,
    output_dir: Path,
    logs_path: Path,
    summary_path: Path,
    work_dir: Path,
    arm: str = "recursive",
    overrides: Mapping[str, Any] | None = None,
    config: RecursiveConfig | None = None,
    name: str | None = None,
    description: str | None = None,
    inputs: Mapping[str, Any] | None = None,
    num_kept: int | None = NUM_KEPT,
    refuse_others: bool = False,
    **load_options: Any,
) -> dict[str, Any]:
    """Train one phase from the model in `parent_dir` and publish the best weights.

    All arms of a seed see the same batches and chunks in the same order. The arm `vanilla_flops`
    takes as many more steps as bring it to the training FLOPs of the recursive arm, with its
    learning rate and corruption scheduled over all of them; `vanilla` also shares the corruption.

    Args:
        phase: `a`, `b` or `c`.
        settings: The `training.<phase>` subtree of the workflow config.
        seed: Of data order, chunk positions, corruption, and what is new in the model.
        parent_dir: A sidecar directory, of the phase before or of this one; for `a` also a base.
        output_dir: Becomes a sidecar directory; best by validation loss at step K.
        logs_path: Parquet, one row a step (columns: README of `results/`).
        summary_path: JSON: parameters, tokens, FLOPs, best step, validation loss by inner step.
        work_dir: The experiment directory (`training.experiment`), with the checkpoints.
        arm: One of `matrix.ARMS`.
        overrides: Parameters of `RecursiveConfig` to change in the parent's config.
        config: In place of the parent's config.
        name, description: Of the experiment.
        inputs: Further paths for its record.
        num_kept: Checkpoints to keep beside the best; None for all.
        refuse_others: Raise where `work_dir` holds another computation, instead of starting afresh.
        load_options: Passed on to `load_model_with_config`.

    Several processes (`torchrun`) share every batch; the first one writes.

    Returns: the summary, in the first process.

    Raises:
        ValueError: bad settings or inputs, or a diverged run.
    """
    fresh = _check_parent(phase, parent_dir)
    reference, config = _configs(arm, parent_dir, fresh, config, overrides or {})
    accelerator = Accelerator(mixed_precision=settings["mixed_precision"])
    wrapper, tokenizer, _ = load_model_with_config(
        parent_dir, config=config, device=accelerator.device, seed=seed, **load_options
    )
    groups = parameter_groups(wrapper, phase, settings, seed)
    trainable = {k: p for k, p in wrapper.named_parameters() if p.requires_grad}
    optimizer = _optimizer(groups, settings)
    context = settings["context_length"]
    check_windows(wrapper, context)
    train = load_tokens(tokens_dir, "train")
    sampler = WindowSampler(train, context + 1, settings["batch_size"], seed)
    windows = validation_windows(tokens_dir, context, settings["num_validation_windows"])

    rows = distributed.share(settings["batch_size"])

    def batch(step: int) -> Tensor:
        return torch.from_numpy(sampler.batch(step)[rows]).to(wrapper.device)

    def validate(step: int, tracker: ExperimentTracker) -> dict[str, float]:
        wrapper.eval()
        by_step = losses_by_step(wrapper, windows, settings["batch_size"])
        if fresh and step == 0 and len(set(by_step)) > 1:
            raise ValueError(f"untrained cells change the loss, by inner step: {by_step}")
        if tokenizer is not None and distributed.is_main():
            _sample(wrapper, tokenizer, windows[0], step, tracker)
        wrapper.train()
        return {f"validation_loss_step_{t}": float(x) for t, x in enumerate(by_step)}

    num_steps, training_flops = _steps_and_flops(arm, settings, wrapper, reference, seed, batch(0))
    objective = build_objective(wrapper, num_steps, settings, seed)
    # It is where it belongs, and the loop averages gradients.
    objective = accelerator.prepare_model(objective, device_placement=False, evaluation_mode=True)
    optimizer = accelerator.prepare(optimizer)

    base_path, revision = base_of(parent_dir), load_options.get("revision")
    if not fresh or (Path(parent_dir) / SIDECAR_NAME).is_file():
        revision = revision or sidecar_facts(parent_dir)["revision"]

    def write_model(folder: Path) -> None:
        save_sidecar(wrapper, folder, base_path, phase, revision)

    fingerprint = {
        "phase": phase,
        "arm": arm,
        "settings": {k: v for k, v in settings.items() if k not in NEUTRAL_KEYS},
        "seed": seed,
        "num_steps": num_steps,
        "config": config.to_dict(),
        "load": numeric(load_options),
        "base": model_digest(base_path, revision),
        "parent": _sidecar_digests(parent_dir),
        "tokens": token_digests(tokens_dir),
        "numerics": NUMERICS_VERSION,
    }
    torch.manual_seed(seed)
    wrapper.train()
    work = WorkDirectory(work_dir, fingerprint, num_kept, refuse_others)
    with ExitStack() as stack:
        tracker = distributed.Silent()
        if distributed.is_main():
            stack.enter_context(work)
            params = {"phase": phase, "arm": arm, "seed": seed, "total_steps": num_steps}
            paths = {"model_path": parent_dir, "base": base_path, "tokens": tokens_dir}
            paths |= {"recursive_config": Path(parent_dir) / CONFIG_NAME, **(inputs or {})}
            tracker = stack.enter_context(
                ExperimentTracker(work_dir, name, description, config, params | settings, paths)
            )
        distributed.wait_for_all()
        result = train_loop(
            objective=objective,
            trainable=trainable,
            optimizer=optimizer,
            settings=LoopSettings(num_steps=num_steps, **{k: settings[k] for k in LOOP_KEYS}),
            batch=batch,
            validate=lambda step: validate(step, tracker),
            watch=f"validation_loss_step_{config.max_inner_steps}",
            work=work,
            tracker=tracker,
            accelerator=accelerator,
            description=f"train {arm} {phase} seed {seed}",
            write_model=write_model,
            read_model=lambda folder: load_sidecar(wrapper, folder),
        )
        if not distributed.is_main():
            distributed.wait_for_all()
            return {}
        with publishing(output_dir) as folder:
            write_model(folder)
        write_parquet(logs_path, result.logs)
        summary = {
            "arm": arm,
            "phase": phase,
            "seed": seed,
            "num_steps": num_steps,
            "training_flops": training_flops,
            "training_tokens": int(result.logs["tokens"][-1]),
            "num_trainable_parameters": sum(p.numel() for p in trainable.values()),
            "num_trainable_by_group": {
                group: sum(p.numel() for p in members.values()) for group, members in groups.items()
            },
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
        results = ("training_flops", "training_tokens", "num_trainable_parameters", "best_step",
                   "best_validation_loss", "validation")  # fmt: skip
        tracker.finish({key: summary[key] for key in results})
    distributed.wait_for_all()
    return summary


def _check_parent(phase: str, parent_dir: str | Path) -> bool:
    """Whether the parent is untrained.

    Raises:
        ValueError: unknown phase, or a parent of another phase than this one and the one before.
    """
    if phase not in PHASES:
        raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {phase!r}")
    has_sidecar = (Path(parent_dir) / SIDECAR_NAME).is_file()
    trained = sidecar_facts(parent_dir)["phase"] if has_sidecar else None
    before = PHASES[PHASES.index(phase) - 1] if phase != PHASES[0] else None
    if trained not in (before, phase):
        is_what = f"is of phase {trained}" if trained else "is not trained"
        needs = f"a model of phase {before}" if before else "a base or untrained cells"
        raise ValueError(f"phase {phase} starts from {needs}; {parent_dir} {is_what}")
    return trained is None


def _configs(
    arm: str,
    parent_dir: str | Path,
    fresh: bool,
    given: RecursiveConfig | None,
    overrides: Mapping[str, Any],
) -> tuple[RecursiveConfig, RecursiveConfig]:
    """The config of the recursive arm, whose FLOPs may count, and that of this arm.

    Raises:
        ValueError: unknown arm, a parent of another kind of arm, or FLOPs of an unknown depth.
    """
    if arm not in ARMS:
        raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {arm!r}")
    own = Path(parent_dir) / CONFIG_NAME
    if not fresh:
        single_pass = RecursiveConfig.from_file(own).single_pass
        if single_pass != bool(ARMS[arm].get("single_pass")):
            kind = "a single-pass" if single_pass else "the recursive"
            raise ValueError(f"{parent_dir}: is of {kind} arm and cannot go on as arm '{arm}'")
    parent = given or RecursiveConfig.from_file(own)
    reference = RecursiveConfig.from_dict({**parent.to_dict(), **overrides})
    if arm == "vanilla_flops" and reference.single_pass and reference.max_inner_steps == 1:
        raise ValueError(
            f"{parent_dir}: does not say how many inner steps the recursive arm takes, whose FLOPs "
            "this arm is given; name them in a config"
        )
    reference = dataclasses.replace(reference, single_pass=False)
    return reference, dataclasses.replace(reference, **ARMS[arm])


def check_windows(wrapper: ChunkRefineWrapper, context: int) -> None:
    """Raises ValueError when windows of `context` tokens are no whole chunks, or too long."""
    width = wrapper.config.chunk_width
    if context % width:
        raise ValueError(
            f"context_length ({context}) must be a multiple of recursive.chunk_width ({width})"
        )
    check_context(wrapper.base, context, "context_length")


def _sidecar_digests(parent_dir: str | Path) -> dict[str, str]:
    """sha256 of the files of a sidecar directory; nothing for a base."""
    parent = Path(parent_dir)
    if not (parent / SIDECAR_NAME).is_file():
        return {}
    files = sorted(path for path in parent.rglob("*.*") if path.suffix in (".safetensors", ".json"))
    return {str(path.relative_to(parent)): file_digest(path) for path in files}


def parameter_groups(
    wrapper: ChunkRefineWrapper, phase: str, settings: Mapping[str, Any], seed: int
) -> Groups:
    """Parameters by group (`sidecar`, `heads`, `lora`, `layers`) and name; puts into the base what
    the phase adds, and marks what trains.

    Raises:
        ValueError: LoRA targets or layers that the base does not have, or a base below float32
            whose own weights would train.
    """
    groups: Groups = {"sidecar": {}, "heads": {}}
    for name, parameter in wrapper.named_parameters():
        if not name.startswith("base."):
            groups["heads" if name.startswith("boundary.") else "sidecar"][name] = parameter
    if phase != "a":
        from kimi_recursive.model.adapter import Adapter, every_nth_layer, lora_config

        adapter = wrapper.adapter = wrapper.adapter or Adapter(wrapper.base, wrapper.layers)
        if phase == "b":
            adapter.set_lora(lora_config(wrapper.base, wrapper.layers, **settings["lora"]), seed)
        if phase == "c":
            if wrapper.base.dtype != torch.float32:
                raise ValueError(
                    "phase c trains weights of the base, and their updates are lost below "
                    f"float32; this base is {wrapper.base.dtype}: set its dtype to float32"
                )
            adapter.set_layers(every_nth_layer(len(wrapper.layers), settings["unfreeze_every"]))
        groups["lora"] = adapter.lora_parameters()
        if adapter.layers:
            groups["layers"] = adapter.layer_parameters()
    wrapper.base.requires_grad_(False)
    for members in groups.values():
        for parameter in members.values():
            parameter.requires_grad_(True)
    return groups


def _optimizer(groups: Groups, settings: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW with a peak learning rate for each group."""
    rates = {"sidecar": "lr", "heads": "lr_heads", "lora": "lr_lora", "layers": "lr_layers"}
    return torch.optim.AdamW(
        [
            {"params": list(members.values()), "name": group, "lr": settings[rates[group]]}
            for group, members in groups.items()
        ],
        betas=(0.9, 0.95),
        weight_decay=settings["weight_decay"],
        fused=True,
    )


def build_objective(
    wrapper: ChunkRefineWrapper, num_steps: int, settings: Mapping[str, Any], seed: int
) -> DraftRepair:
    return DraftRepair(
        wrapper,
        num_steps,
        settings["own_draft_share"],
        seed,
        settings.get("scheduled_sampling", 0.0),
        settings.get("l2_pull", 0.0),
    )


def _steps_and_flops(
    arm: str,
    settings: Mapping[str, Any],
    wrapper: ChunkRefineWrapper,
    reference: RecursiveConfig,
    seed: int,
    windows: Tensor,
) -> tuple[int, int]:
    """Optimizer steps of an arm, and their FLOPs.

    Args:
        reference: The config of the recursive arm.
        windows: A batch.
    """
    num_steps = settings["num_steps"]
    if arm == "vanilla_flops":
        recursive = build_wrapper(wrapper.base, reference)
        recursive.adapter = wrapper.adapter
        twin = build_objective(recursive, num_steps, settings, seed)
        budget = cumulative_training_flops(twin, windows, num_steps)[-1]
        # One pass of this arm costs no less than one of the recursive arm's.
        most = num_steps * (2 + reference.max_inner_steps)
        own = cumulative_training_flops(
            build_objective(wrapper, num_steps, settings, seed), windows, most
        )
        num_steps = steps_for_flops(own, budget)
    objective = build_objective(wrapper, num_steps, settings, seed)
    return num_steps, cumulative_training_flops(objective, windows, num_steps)[-1]


@torch.no_grad()
def _sample(
    wrapper: ChunkRefineWrapper, tokenizer, window: Window, step: int, tracker: ExperimentTracker
) -> None:
    """Note how the model continues a validation document."""
    prompt = window.inputs[:SAMPLE_PROMPT_TOKENS].tolist()
    output = wrapper.generate_chunks(
        torch.tensor([prompt], device=wrapper.device), max_new_tokens=SAMPLE_NEW_TOKENS
    )
    new = output[0, len(prompt) :].tolist()
    texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, new))
    tracker.add_generation_sample(step, *texts, token_ids=new)
