"""`kimi-recursive generate`: continue prompts with a refined model or its base."""

from __future__ import annotations

import json
import shutil
import sys
import time
from dataclasses import dataclass
from itertools import takewhile, zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kimi_recursive.cli.options import Device, DeviceMap, Dtype, Revision, TrustRemoteCode
from kimi_recursive.model.config import COMMIT_MODES
from kimi_recursive.processes.logs import quiet_libraries

if TYPE_CHECKING:
    from kimi_recursive.model.output import GenerationStats
    from kimi_recursive.model.wrapper import ChunkRefineWrapper

MIN_COLUMN = 24  # characters of text in a column of --compare


def generate(
    model: Annotated[
        str,
        typer.Option(help="A sidecar (directory or Hub id), or a base alone."),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="Text to continue; several become one batch. Default: standard input."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many new tokens.")] = 64,
    commit: Annotated[
        str | None,
        typer.Option(help="verified (exact) or learned (boundary head). Default: the model's."),
    ] = None,
    num_steps: Annotated[
        int | None,
        typer.Option(min=0, help="Inner steps of --commit verified. Default: the model's."),
    ] = None,
    sample: Annotated[
        bool, typer.Option("--sample", "--do-sample", help="Sample, not greedy.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="For --sample.")] = 1.0,
    top_k: Annotated[int, typer.Option(min=0, help="For --sample; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="For --sample.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="For --sample.")] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option(
            "--stop", "--stop-strings", help="A text that ends the continuation; repeatable."
        ),
    ] = None,
    stream: Annotated[
        bool, typer.Option("--stream", help="Print tokens as they are committed; one prompt only.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show base and refined model side by side.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="One object per prompt, with token ids.")
    ] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue prompts; statistics go to standard error.

    --compare shows what the base generates beside what the refined model does, how many tokens
    of each prompt agree (not with --sample), and how fast each is. With --commit learned, verified
    generation is shown as well.
    """
    if commit not in (None, *COMMIT_MODES):
        raise ValueError(f"--commit: must be one of {', '.join(COMMIT_MODES)}, got '{commit}'")
    if stream + compare + as_json > 1:
        raise ValueError("--stream, --compare and --json exclude each other")
    if not sample and (temperature, top_k, top_p, seed) != (1.0, 0, 1.0, None):
        raise ValueError("--temperature, --top-k, --top-p and --seed need --sample")
    if not prompt and sys.stdin.isatty():
        raise ValueError("no prompt: use --prompt, or write one to standard input")
    prompts = prompt or [sys.stdin.read().rstrip("\n")]
    if stream and len(prompts) > 1:
        raise ValueError(f"--stream: takes one prompt, got {len(prompts)}")
    quiet_libraries()
    from kimi_recursive.model.loading import load_model_with_config
    from kimi_recursive.model.placement import placed

    options: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision}
    options |= {"device_map": device_map, "trust_remote_code": trust_remote_code}
    wrapper, tokenizer, config = load_model_with_config(model, **placed(options))
    if tokenizer is None:
        raise ValueError(f"{model}: has no tokenizer")
    if not wrapper.active and (compare or commit is not None or num_steps is not None):
        raise ValueError(
            f"{model} is a base without cells: --compare, --commit and --num-steps need a sidecar"
        )
    shared: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    if sample:
        shared |= {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if stop:
        shared |= {"stop_strings": stop, "tokenizer": tokenizer}
    refined: dict[str, Any] = {
        "commit": commit or config.commit,
        "num_steps": num_steps,
        "seed": seed,
    }
    if compare:
        runs = {"base": _run(wrapper, tokenizer, prompts, shared, None, seed)}
        if refined["commit"] == "learned":
            verified = refined | {"commit": "verified"}
            runs["verified"] = _run(wrapper, tokenizer, prompts, shared, verified)
        runs[refined["commit"]] = _run(wrapper, tokenizer, prompts, shared, refined)
        for row, text in enumerate(prompts):
            texts = {name: run.texts[row] for name, run in runs.items()}
            typer.echo(f"> {text}\n{side_by_side(texts)}\n")
        for name, run in runs.items():
            typer.echo(f"{name}: {run.summary()}", err=True)
            if name != "base" and not sample:  # two samples need not agree
                other = "verified" if name == "learned" else "base"
                same = agreement(run.tokens, runs[other].tokens)
                typer.echo(f"  the first tokens equal those of {other}: {same}", err=True)
        return
    if stream:
        from transformers import TextStreamer

        shared["streamer"] = TextStreamer(tokenizer, skip_special_tokens=True)
    run = _run(wrapper, tokenizer, prompts, shared, refined if wrapper.active else None, seed)
    for text, completion, ids in zip(prompts, run.texts, run.tokens, strict=True):
        if as_json:
            found = {"prompt": text, "completion": completion, "token_ids": ids}
            typer.echo(json.dumps(found, ensure_ascii=False))
        elif not stream:
            typer.echo(text + completion)
    typer.echo(run.summary(), err=True)


@dataclass
class Run:
    """Continuations of all prompts: texts, token ids, and the time that they took."""

    texts: list[str]
    tokens: list[list[int]]
    seconds: float
    stats: GenerationStats | None

    def summary(self) -> str:
        """One line."""
        num_tokens = sum(map(len, self.tokens))
        line = f"{num_tokens} tokens, {num_tokens / self.seconds:.1f} tokens/s"
        if (stats := self.stats) is None:
            return line
        return (
            f"{line}; {stats.num_rounds} rounds, {stats.mean_inner_steps:.2f} inner steps and "
            f"{stats.mean_committed:.2f} tokens committed a round, "
            f"{100 * stats.acceptance_rate:.0f} % of drafts accepted; "
            f"draft {stats.draft_seconds:.2f} s, refinement {stats.refine_seconds:.2f} s"
        )


def _run(
    wrapper: ChunkRefineWrapper,
    tokenizer: Any,
    prompts: list[str],
    shared: dict[str, Any],
    refined: dict[str, Any] | None,
    seed: int | None = None,
) -> Run:
    """Continue the prompts as one batch, with these options of the loop; None: the base alone."""
    import torch

    from kimi_recursive.evaluation.samples import prompt_ids
    from kimi_recursive.model.checks import check_context
    from kimi_recursive.model.generation import plain_generation

    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, rows))
    check_context(wrapper.base, longest + shared["max_new_tokens"], "prompt and --max-new-tokens")
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=wrapper.device)
    lengths = torch.tensor([len(row) for row in rows], device=ids.device)[:, None]
    mask = (torch.arange(longest, device=ids.device) >= longest - lengths).long()
    options = {**shared, "attention_mask": mask, "pad_token_id": pad}
    output: Any
    stats: Any = None
    started = time.perf_counter()
    if refined is not None:
        output, stats = wrapper.generate_chunks(ids, **options, **refined, return_stats=True)
    else:
        if seed is not None:
            torch.manual_seed(seed)
        with wrapper.disabled(), plain_generation(wrapper.base):
            output = wrapper.generate_chunks(ids, **options)
    seconds = time.perf_counter() - started
    tokens = output[:, longest:].tolist()
    for row in tokens:
        while row and row[-1] == pad:
            row.pop()
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return Run(texts, tokens, seconds, stats)


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """`n of m` for each prompt: its first n tokens are the same in both runs."""
    num_same = [
        sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False)))
        for a, b in zip(ours, theirs, strict=True)
    ]
    totals = [max(len(a), len(b)) for a, b in zip(ours, theirs, strict=True)]
    return ", ".join(f"{n} of {total}" for n, total in zip(num_same, totals, strict=True))


def side_by_side(texts: dict[str, str], width: int | None = None) -> str:
    """Texts as columns with a heading, or below one another in a narrow terminal."""
    width = width or shutil.get_terminal_size((100, 24)).columns
    column = (width - 3 * (len(texts) - 1)) // len(texts)
    if column < MIN_COLUMN:
        return "\n".join(f"[{name}]\n{text}" for name, text in texts.items())
    columns = []
    for name, text in texts.items():
        lines = [part for line in text.splitlines() for part in wrap(line, column) or [""]]
        columns.append([name, "-" * column, *lines])
    rows = zip_longest(*columns, fillvalue="")
    return "\n".join(" | ".join(f"{cell:<{column}}" for cell in row).rstrip() for row in rows)
