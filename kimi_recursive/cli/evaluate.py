"""`kimi-recursive evaluate`: what a model scores on held-out text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kimi_recursive.cli.options import (
    Corpus,
    Device,
    DeviceMap,
    Dtype,
    Revision,
    TokensDir,
    TrustRemoteCode,
    check_choice,
    read_recursive_config,
    tokens_of,
)
from kimi_recursive.evaluation.settings import EvaluationSettings, EvaluationSpec
from kimi_recursive.layout import EvaluationFiles
from kimi_recursive.matrix.runs import PLAIN_STAGE, STAGES, stages_of
from kimi_recursive.model.config import get_after_surgery_config, get_baseline_config
from kimi_recursive.processes.logs import quiet_libraries

DEFAULT_PROMPTS = ("The state of the Union is", "My fellow citizens,", "The Congress should")


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
            help="RecursiveConfig as JSON. Default: for baseline, recursion off; for other "
            "stages the sidecar's own config; for a base without a sidecar, untrained cells.",
        ),
    ] = None,
    use_recursive: Annotated[
        bool,
        typer.Option("--use_recursive", help="Legacy: recursion on, even for --stage baseline."),
    ] = False,
    output_dir: Annotated[
        Path,
        typer.Option("--output_dir", "--output-dir", help="Folder of the two files."),
    ] = Path("eval_results"),
    corpus: Corpus = None,
    tokens_dir: TokensDir = None,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    context_length: Annotated[int, typer.Option(min=1, help="Tokens per window.")] = 256,
    max_windows: Annotated[
        int, typer.Option(min=1, help="Windows per document, from its start.")
    ] = 8,
    batch_size: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 16,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help=f"Text to continue; repeatable. Default: {' | '.join(DEFAULT_PROMPTS)}"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to add to each prompt.")] = 48,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Score a model: perplexity and token accuracy by inner step, generations, throughput.

    Writes <stage>_results.json and <stage>_documents.parquet to --output_dir.
    """
    check_choice("--stage", stage, STAGES)
    check_choice("--split", split, ("train", "validation", "test"))
    if recursive_config is not None and use_recursive:
        raise ValueError("--recursive-config and --use_recursive exclude each other")
    config = read_recursive_config(recursive_config)
    quiet_libraries()
    from kimi_recursive.evaluation.stage import evaluate_stage
    from kimi_recursive.layout import SIDECAR_NAME
    from kimi_recursive.model.loading import local_model
    from kimi_recursive.model.sidecar import Sidecar

    fetched, of_base = local_model(model_path, revision)
    sidecar = Sidecar.find(fetched)
    plain = stage == "baseline" or (stage == PLAIN_STAGE and sidecar is None)
    if config is None and plain and not use_recursive:
        config = get_baseline_config()
    elif config is None and sidecar is None:
        config = get_after_surgery_config()
    allowed = stages_of(sidecar, config is None or config.recursive_enabled)
    if stage not in allowed:
        what = model_path if sidecar else f"{model_path} holds no sidecar ({SIDECAR_NAME}) and"
        raise ValueError(f"--stage {stage}: {what} is of stage {' or '.join(allowed)}")
    settings = EvaluationSettings(
        context_length=context_length,
        batch_size=batch_size,
        max_windows_per_document=max_windows,
        prompts=prompt or list(DEFAULT_PROMPTS),
        max_new_tokens=max_new_tokens,
    )
    files = EvaluationFiles(output_dir, stage)
    with tokens_of(tokens_dir, corpus or ["sotu"], fetched, of_base, trust_remote_code) as tokens:
        results = evaluate_stage(
            EvaluationSpec(stage, settings, split),
            model_path,
            tokens,
            files,
            config=config,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    for row in results["perplexity"]["by_step"]:
        typer.echo(
            f"step {row['step']}: perplexity {row['perplexity']:.4f}, "
            f"token accuracy {100 * row['token_accuracy']:.2f} %"
        )
    typer.echo(f"wrote {files.results}")
