"""`kimi-recursive run-experiment`: train one phase by hand, or run a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kimi_recursive.cli.options import (
    Corpus,
    DeviceMap,
    Dtype,
    Revision,
    TokensDir,
    TrustRemoteCode,
    check_choice,
    read_recursive_config,
    tokens_of,
)
from kimi_recursive.files import read_json_object
from kimi_recursive.processes.logs import quiet_libraries
from kimi_recursive.training.arms import ARMS, MAX_SEED, PHASES
from kimi_recursive.training.settings import LoraSettings, PhaseSettings
from kimi_recursive.training.spec import LoadOptions, PhaseSpec, Record
from kimi_recursive.training.tracking import DEFAULT, TRACKERS


def run_experiment(
    experiment_name: Annotated[
        str, typer.Option("--experiment-name", help="Name of the folder in --output-dir.")
    ],
    model_path: Annotated[
        str,
        typer.Option(
            "--model-path",
            "--model_path",
            help="Phase a: a base (directory or Hub id), or a sidecar with untrained cells. Phases "
            "b and c: a model of the previous phase, such as EXPERIMENT/checkpoints/best/model.",
        ),
    ],
    description: Annotated[str, typer.Option(help="What the experiment tests, in words.")] = "",
    recursive_config: Annotated[
        Path | None,
        typer.Option(
            "--recursive-config",
            "--recursive_config",
            help="RecursiveConfig as JSON. Default: the model's own; for a base, that of phase a. "
            "With recursion off (config/recursive/baseline.json), the run scores the base and "
            "trains nothing.",
        ),
    ] = None,
    phase: Annotated[
        str,
        typer.Option(
            help="What is trained. a: the sidecar; b: also LoRA on the top third of the base; "
            "c: also every 4th layer of the base."
        ),
    ] = "a",
    num_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per step.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak rate of the cells and the latent path.")] = 3e-4,
    lr_heads: Annotated[
        float | None, typer.Option(help="For the boundary head. Default: --lr.")
    ] = None,
    lr_feedback: Annotated[
        float | None, typer.Option(help="For the token feedback's gate. Default: 30 times --lr.")
    ] = None,
    lr_lora: Annotated[float | None, typer.Option(help="For LoRA. Default: --lr.")] = None,
    lr_layers: Annotated[
        float | None, typer.Option(help="For unfrozen layers. Default: a tenth of --lr.")
    ] = None,
    warmup_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Linear warm-up steps. Default: a tenth of --num-steps."),
    ] = None,
    lr_schedule: Annotated[str, typer.Option(help="constant, linear or cosine.")] = "constant",
    save_interval: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    eval_interval: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 100,
    log_interval: Annotated[int, typer.Option(min=1, help="Steps between lines of metrics.")] = 10,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Decides cells, data order and corruption.")
    ] = 0,
    arm: Annotated[str, typer.Option(help=f"One of {', '.join(ARMS)}.")] = "recursive",
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens per window. Default: four chunks.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(min=1, help="Phase b: rank of LoRA.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="Phase b: alpha of LoRA.")] = 16.0,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(help="Phase b: a module such as q_proj; repeatable. Default: all linear."),
    ] = None,
    unfreeze_every: Annotated[int, typer.Option(min=1, help="Phase c: every n-th layer.")] = 4,
    l2_pull: Annotated[float, typer.Option(min=0, help="Phase c: pull to the base.")] = 0.01,
    scheduled_sampling: Annotated[
        float, typer.Option(min=0, max=1, help="Phases b, c: final share of own draft tokens.")
    ] = 0.1,
    own_draft_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share of corrupted tokens that the base drafts.")
    ] = 0.5,
    weight_decay: Annotated[float, typer.Option(min=0, help="Weight decay of AdamW.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to this norm.")] = 1.0,
    num_validation_windows: Annotated[int, typer.Option(min=1, help="Per validation.")] = 32,
    mixed_precision: Annotated[str, typer.Option(help="no or bf16.")] = "no",
    optimizer: Annotated[
        str, typer.Option(help="adamw, or adamw_8bit: its state in 8 bits, by bitsandbytes.")
    ] = "adamw",
    gradient_accumulation_steps: Annotated[
        int, typer.Option(min=1, help="Parts of a batch that are in memory one after the other.")
    ] = 1,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            help="Keep no activations of inner steps, compute them again: less memory, more time.",
        ),
    ] = False,
    tracking: Annotated[
        list[str] | None,
        typer.Option(
            help=f"Where metrics are also shown: {', '.join(TRACKERS)}; repeatable. Nothing is "
            "sent unless WANDB_MODE says so. Default: tensorboard."
        ),
    ] = None,
    corpus: Corpus = None,
    tokens_dir: TokensDir = None,
    output_dir: Annotated[Path, typer.Option(help="Their folder.")] = Path("experiments"),
    keep_checkpoints: Annotated[
        int | None, typer.Option(min=1, help="How many to keep beside the best. Default: all.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace another experiment of this name.")
    ] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train one phase by hand, or run a baseline, into an experiment directory.

    An interrupted run resumes when the same command is given again. OUTPUT_DIR/EXPERIMENT_NAME
    gets metadata, checkpoints, TensorBoard logs, metrics and notes.
    """
    check_choice("--phase", phase, PHASES)
    check_choice("--arm", arm, tuple(ARMS))
    check_choice("--lr-schedule", lr_schedule, ("linear", "cosine", "constant"))
    check_choice("--mixed-precision", mixed_precision, ("no", "bf16"))
    check_choice("--optimizer", optimizer, ("adamw", "adamw_8bit"))
    if experiment_name in ("", ".", "..") or Path(experiment_name).name != experiment_name:
        raise ValueError(f"--experiment-name: must be a plain folder name, got '{experiment_name}'")
    rates: dict[str, Any] = {
        "lr": lr,
        "lr_heads": lr if lr_heads is None else lr_heads,
        "lr_feedback": 30 * lr if lr_feedback is None else lr_feedback,
        "lr_lora": lr if lr_lora is None else lr_lora,
        "lr_layers": lr / 10 if lr_layers is None else lr_layers,
    }
    for name, value in {**rates, "max_grad_norm": max_grad_norm, "lora_alpha": lora_alpha}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: must be above 0, got {value}")
    for name, value in {"l2_pull": l2_pull, "weight_decay": weight_decay}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: must be at least 0, got {value}")
    config = read_recursive_config(recursive_config)
    quiet_libraries()
    from kimi_recursive.model.loading import local_model
    from kimi_recursive.processes.distributed import is_main
    from kimi_recursive.training.by_hand import run_experiment, starting_config

    path, revision = local_model(model_path, revision)
    fetched = str(path)
    config = starting_config(fetched, config)
    targets = "all-linear" if lora_target in (None, [], ["all-linear"]) else lora_target
    settings = PhaseSettings(
        **rates,
        num_steps=num_steps,
        batch_size=batch_size,
        context_length=context_length or 4 * config.chunk_width,
        lr_schedule=lr_schedule,
        warmup_steps=num_steps // 10 if warmup_steps is None else warmup_steps,
        weight_decay=weight_decay,
        max_grad_norm=max_grad_norm,
        own_draft_share=own_draft_share,
        eval_interval=eval_interval,
        save_interval=save_interval,
        log_interval=log_interval,
        num_validation_windows=num_validation_windows,
        mixed_precision=mixed_precision,
        optimizer=None if optimizer == "adamw" else optimizer,
        gradient_accumulation_steps=gradient_accumulation_steps,
        gradient_checkpointing=gradient_checkpointing,
        scheduled_sampling=None if phase == "a" else scheduled_sampling,
        lora=LoraSettings(lora_rank, lora_alpha, targets) if phase == "b" else None,
        unfreeze_every=unfreeze_every if phase == "c" else None,
        l2_pull=l2_pull if phase == "c" else None,
    )
    corpus = corpus or ["sotu"]
    inputs: dict[str, Any] = {"recursive_config": recursive_config}
    inputs["corpus"] = None if tokens_dir else ", ".join(corpus)
    record = Record(
        name=experiment_name,
        description=description,
        inputs={name: value for name, value in inputs.items() if value},
        tokens_stay=tokens_dir is not None,
        num_kept=keep_checkpoints,
        tracking=tracking or DEFAULT,
        refuse_others=not force,
    )
    spec = PhaseSpec(phase, settings, seed, arm, config=config)
    load = LoadOptions(dtype, revision, trust_remote_code, device_map)
    directory = output_dir / experiment_name
    with tokens_of(tokens_dir, corpus, fetched, revision, trust_remote_code) as tokens:
        run_experiment(spec, fetched, tokens, directory, load, record)
    if not is_main():  # of the processes that torchrun started
        return
    results = read_json_object(directory / "experiment_metadata.json")["final_results"]
    for name, value in results.items():
        if isinstance(value, int | float):
            typer.echo(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    typer.echo(f"wrote {directory}")
