"""Evaluation by inner step: perplexity and token accuracy per document, throughput."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import polars as pl
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from kimi_recursive.data.tokens import TokenSplit
from kimi_recursive.data.windows import Window, batches, document_windows
from kimi_recursive.evaluation.bootstrap import wilson_interval
from kimi_recursive.evaluation.flops import forward_flops_per_token
from kimi_recursive.evaluation.samples import (
    chain_of_thought_answers,
    counts_by_step,
    generate_samples,
)
from kimi_recursive.evaluation.settings import EvaluationSettings
from kimi_recursive.model.checks import check_context
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.processes import distributed

Scored = tuple[dict[str, Any], pl.DataFrame]  # results, and scores by document


@torch.no_grad()
def score_windows(
    wrapper: ChunkRefineWrapper,
    windows: Sequence[Window],
    batch_size: int,
    num_steps: int | None = None,
    progress: bool = False,
) -> pl.DataFrame:
    """Teacher-forced scores of windows, chunk by chunk on the grid from each window's first chunk.

    Of a pair that grid is generation's: where every token is correct, greedy generation gives the
    completion.

    Returns:
        One row per window, chunk and inner step: document (int), start, chunk, step, num_tokens,
        loss_sum (nats), num_correct, p_commit (null at step 0 and when the loop is not active),
        num_running (tokens that no earlier step had stopped at; null where none stops on its own),
        seconds (this row's share of its batch).
    """
    columns = ("document", "start", "chunk", "step", "num_tokens", "loss_sum", "num_correct",
               "p_commit", "num_running", "seconds")  # fmt: skip
    rows: dict[str, list] = {name: [] for name in columns}
    bar = tqdm(
        total=len(windows), desc="evaluate", unit="window", disable=None if progress else True
    )
    for batch in batches(windows, batch_size):
        inputs = torch.from_numpy(np.stack([w.inputs for w in batch])).to(wrapper.device)
        targets = torch.from_numpy(np.stack([w.targets for w in batch])).to(wrapper.device)
        offset, clock = batch[0].chunk_start, time.perf_counter()
        for number, chunk in enumerate(wrapper.chunks(inputs, chunk_start=offset)):
            width = chunk.input_ids.shape[1]
            gold = targets[:, offset : offset + width]
            offset += width
            running = [width] * len(batch)
            for state in wrapper.steps(chunk, num_steps):
                ce = F.cross_entropy(
                    state.output.float().transpose(1, 2), gold, reduction="none"
                ).double()
                correct = (state.output.argmax(-1) == gold).sum(1)
                p_commit: list[float | None] = [None] * len(batch)
                num_running: list[int | None] = [None] * len(batch)
                if state.halting is not None:
                    num_running = list(running)
                    running = (~state.halting.stopped).sum(1).tolist()
                elif state.step and wrapper.boundary is not None:
                    p_commit = wrapper.boundary(state.h_top)[0].tolist()
                rows["document"] += [w.document for w in batch]
                rows["start"] += [w.start for w in batch]
                rows["chunk"] += [number] * len(batch)
                rows["step"] += [state.step] * len(batch)
                rows["num_tokens"] += [width] * len(batch)
                rows["loss_sum"] += ce.sum(1).tolist()
                rows["num_correct"] += correct.tolist()
                rows["p_commit"] += p_commit
                rows["num_running"] += num_running
                before, clock = clock, time.perf_counter()
                rows["seconds"] += [(clock - before) / len(batch)] * len(batch)
        bar.update(len(batch))
    bar.close()
    return pl.DataFrame(rows, schema_overrides={"p_commit": pl.Float64, "num_running": pl.Int64})


def losses_by_step(
    wrapper: ChunkRefineWrapper, windows: Sequence[Window], batch_size: int
) -> list[float]:
    """Mean cross-entropy in nats per token at steps 0..K; of several processes each scores its
    share of the windows."""
    scores = score_windows(wrapper, distributed.part(windows), batch_size)
    sums = torch.zeros(wrapper.resolve_steps(None) + 1, 2, dtype=torch.float64)
    for step, *summed in scores.group_by("step").agg(pl.col("loss_sum", "num_tokens").sum()).rows():
        sums[step] = sums.new_tensor(summed)
    losses, num_tokens = distributed.total(sums).T
    return (losses / num_tokens).tolist()


def document_scores(scores: pl.DataFrame, split: TokenSplit) -> pl.DataFrame:
    """One row per document and inner step: document_id, step, num_tokens, loss_sum, num_correct,
    of a split with pairs group, and where tokens stop on their own inner_steps: what they have
    taken so far, summed."""
    ids = pl.DataFrame(
        {"document": range(len(split.document_ids)), "document_id": split.document_ids}
    )
    more = [] if split.groups is None else ["group"]
    if scores["num_running"].count():
        more.append("inner_steps")
    if split.groups is not None:
        ids = ids.with_columns(group=pl.Series(split.groups, dtype=pl.String))
    return (
        scores.group_by("document", "step")
        .agg(
            pl.col("num_tokens", "loss_sum", "num_correct").sum(),
            inner_steps=pl.col("num_running").sum(),
        )
        .sort("document", "step")
        .with_columns(pl.col("inner_steps").cum_sum().over("document"))
        .join(ids, on="document", how="left", maintain_order="left")
        .select("document_id", "step", "num_tokens", "loss_sum", "num_correct", *more)
    )


def summarize_scores(documents: pl.DataFrame) -> list[dict[str, Any]]:
    """Per inner step: loss (nats per token), perplexity, token_accuracy, over all tokens."""
    table = (
        documents.group_by("step")
        .agg(pl.col("num_tokens", "loss_sum", "num_correct").sum())
        .sort("step")
        .select(
            "step",
            loss=pl.col("loss_sum") / pl.col("num_tokens"),
            perplexity=(pl.col("loss_sum") / pl.col("num_tokens")).exp(),
            token_accuracy=pl.col("num_correct") / pl.col("num_tokens"),
        )
    )
    return table.to_dicts()


def exact_match_by_group(documents: pl.DataFrame, split: TokenSplit) -> list[dict[str, Any]] | None:
    """Of the pairs among the documents, per group and inner step: num_pairs, exact_match (the share
    whose completion greedy generation gives) with the bounds of its 95 % interval, loss (nats per
    completion token), and where tokens stop on their own mean_inner_steps, of a completion token.
    None where no document is a pair."""
    if split.num_prompt is None:
        return None
    steps = {}
    if "inner_steps" in documents.columns:
        steps = {"mean_inner_steps": pl.col("inner_steps").sum() / pl.col("num_tokens").sum()}
    is_pair = pl.Series(split.document_ids).filter(split.num_prompt > 1)
    table = (
        documents.filter(pl.col("document_id").is_in(is_pair.implode()))
        .group_by("group", "step")
        .agg(
            num_pairs=pl.len(),
            num_exact=(pl.col("num_correct") == pl.col("num_tokens")).sum(),
            loss=pl.col("loss_sum").sum() / pl.col("num_tokens").sum(),
            **steps,
        )
        .sort("group", "step", nulls_last=True)
    )
    return [
        {
            "group": group,
            "step": step,
            "num_pairs": pairs,
            "exact_match": exact / pairs,
            "exact_match_interval": list(wilson_interval(exact, pairs)),
            "loss": loss,
            **dict(zip(steps, taken, strict=True)),
        }
        for group, step, pairs, exact, loss, *taken in table.iter_rows()
    ]


def largest_difference(one: pl.Series, other: pl.Series) -> float:
    """Largest absolute difference of two columns of numbers."""
    return float(cast("float", (one - other).abs().max()))


def halting_scores(scores: pl.DataFrame, threshold: float) -> dict[str, Any] | None:
    """What stopping early would give: each chunk at its first step with p_commit >= `threshold`, or
    at its last step. None when the loop is not active. Where tokens stop on their own, what that
    gives, for tokens in place of chunks.

    Returns: `mean_inner_steps` over chunks, the `perplexity` of all tokens at those steps, and
        `num_chunks_by_step`, how many chunks stop after 1, 2, ... K inner steps; of tokens
        `num_tokens_by_step`.
    """
    refined = scores.filter(pl.col("step") > 0)
    if refined.is_empty():
        return None
    last = refined.select(pl.col("step").max()).item()
    if refined["num_running"].count():
        at_last = refined.filter(pl.col("step") == last)
        num_tokens = int(at_last["num_tokens"].sum())
        loss_sum = float(at_last["loss_sum"].sum())
        sums = refined.group_by("step").agg(pl.col("num_running").sum()).sort("step")
        running = [*sums["num_running"], 0]
        return {
            "mean_inner_steps": sum(running) / num_tokens,
            "perplexity": math.exp(loss_sum / num_tokens),
            "num_tokens_by_step": [a - b for a, b in pairwise(running)],
        }
    stop = pl.when(pl.col("p_commit") >= threshold).then(pl.col("step")).otherwise(last).min()
    stopped = refined.filter(pl.col("step") == stop.over("document", "start", "chunk"))
    loss_sum, num_tokens, inner_steps = stopped.select(
        pl.col("loss_sum", "num_tokens").sum(), pl.col("step").mean()
    ).row(0)
    return {
        "mean_inner_steps": inner_steps,
        "perplexity": math.exp(loss_sum / num_tokens),
        "num_chunks_by_step": counts_by_step(stopped["step"], last),
    }


def _score(
    wrapper: ChunkRefineWrapper,
    split: TokenSplit,
    settings: EvaluationSettings,
    depths: Sequence[int],
) -> Scored:
    """Score one model on held-out documents: all that its prompts do not change."""
    windows = document_windows(split, settings.context_length, settings.max_windows_per_document)
    if not windows:
        raise ValueError("the evaluation split has no document of at least two tokens")
    last = wrapper.resolve_steps(None)
    deepest = max([last, *depths]) if wrapper.active else 0
    scores = score_windows(wrapper, windows, settings.batch_size, deepest, progress=True)
    within = scores.filter(pl.col("step") <= last)
    scores = scores.filter((pl.col("step") <= last) | pl.col("step").is_in(list(depths)))
    documents = document_scores(scores, split)
    by_step = summarize_scores(documents)
    if split.num_prompt is not None and settings.chain_of_thought_tokens and not wrapper.active:
        answers = chain_of_thought_answers(
            wrapper, windows, settings.batch_size, settings.chain_of_thought_tokens
        )
        ids = pl.Series(split.document_ids).gather(answers["document"])
        answers = answers.select("answer_offset", document_id=ids)
        documents = documents.join(answers, on="document_id", how="left", maintain_order="left")
    at_last = next(row for row in by_step if row["step"] == last)
    first = next(batches(windows, settings.batch_size))
    input_ids = torch.from_numpy(first[0].inputs)[None].to(wrapper.device)
    num_tokens = sum(w.num_targets for w in windows)
    results = {
        "perplexity": {
            **{k: at_last[k] for k in ("perplexity", "token_accuracy", "loss")},
            "num_tokens": num_tokens,
            "num_documents": documents["document_id"].n_unique(),
            "by_step": by_step,
        },
        "pairs": exact_match_by_group(documents, split),
        "inner_steps": last,
        "halting": halting_scores(within, wrapper.config.commit_threshold),
        "forward_flops_per_token": forward_flops_per_token(wrapper, input_ids),
        "throughput": {"evaluated_tokens_per_second": num_tokens / within["seconds"].sum()},
    }
    return results, documents


def check_lengths(base: PreTrainedModel, settings: EvaluationSettings) -> None:
    """Raises ValueError when windows or continuations are longer than the base can read."""
    for name in ("context_length", "max_new_tokens"):
        check_context(base, getattr(settings, name), f"evaluation.{name}")


def evaluate_model(
    wrapper: ChunkRefineWrapper,
    tokenizer,
    split: TokenSplit,
    settings: EvaluationSettings,
    depths: Sequence[int] = (),
    scored: Scored | None = None,
) -> Scored:
    """Evaluate one model on held-out documents.

    Args:
        depths: Numbers of inner steps to score beside 0..K; they do not count in the throughput.
        scored: What an earlier evaluation with other prompts returned; its scores are taken.

    Returns:
        Results as JSON types, and `document_scores`. `perplexity.perplexity` and
        `perplexity.token_accuracy` are those of step K; `by_step` has all.

    Raises:
        ValueError: no document with two tokens, prompts without a tokenizer, or a context that the
            base cannot read.
    """
    check_lengths(wrapper.base, settings)
    if tokenizer is None and settings.prompts:
        raise ValueError("evaluation.prompts need a tokenizer, and the model has none")
    scores, documents = scored or _score(wrapper, split, settings, depths)
    samples, generation = generate_samples(
        wrapper, tokenizer, settings.prompts, settings.max_new_tokens
    )
    speed = {"generated_tokens_per_second": generation.pop("tokens_per_second")}
    results = {
        **scores,
        **generation,
        "throughput": {**scores["throughput"], **speed},
        "generations": samples,
    }
    return results, documents
