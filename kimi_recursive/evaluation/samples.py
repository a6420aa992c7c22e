"""What a model writes: continuations of prompts, and answers after thinking aloud."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl
import torch

from kimi_recursive.data.windows import Window, batches
from kimi_recursive.model.generation import plain_generation
from kimi_recursive.model.wrapper import ChunkRefineWrapper


def counts_by_step(inner_steps: Iterable[int], last: int) -> list[int]:
    """How many are 1, 2, ... `last`."""
    found = Counter(inner_steps)
    return [found[step] for step in range(1, last + 1)]


def prompt_ids(tokenizer, prompt: str) -> list[int]:
    """Token ids of a prompt, behind the tokenizer's bos where it has one.

    Raises:
        ValueError: there is no token.
    """
    ids, bos = tokenizer.encode(prompt), tokenizer.bos_token_id
    ids = ids if bos is None or ids[:1] == [bos] else [bos, *ids]
    if not ids:
        raise ValueError(f"prompt {prompt!r}: has no token; this model needs at least one")
    return ids


def generate_samples(
    wrapper: ChunkRefineWrapper, tokenizer, prompts: Sequence[str], max_new_tokens: int
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Greedy continuations, one prompt at a time.

    The base generates with nothing but greedy decoding: a repetition penalty in its generation
    config would make it another model than the one that is compared.

    Returns: prompt, completion and token_ids of each; over all of them tokens per second (None
        without prompts), inner steps per round of drafting and refining (0 for the base), and how
        many rounds ran 1, 2, ... K of them (empty for the base).
    """
    samples, inner_steps, num_tokens = [], [], 0
    started = time.perf_counter()
    for prompt in prompts:
        input_ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=wrapper.device)
        mask = torch.ones_like(input_ids)
        if wrapper.active:
            output, stats = wrapper.generate_chunks(
                input_ids, max_new_tokens=max_new_tokens, attention_mask=mask, return_stats=True
            )
            inner_steps += stats.inner_steps
        else:
            with plain_generation(wrapper.base):
                output = wrapper.generate_chunks(
                    input_ids, attention_mask=mask, max_new_tokens=max_new_tokens
                )
        new = output[0, input_ids.shape[1] :].tolist()
        num_tokens += len(new)
        text = tokenizer.decode(new, skip_special_tokens=True)
        samples.append({"prompt": prompt, "completion": text, "token_ids": new})
    seconds = time.perf_counter() - started
    return samples, {
        "tokens_per_second": num_tokens / seconds if prompts else None,
        "mean_inner_steps": sum(inner_steps) / max(1, len(inner_steps)),
        "num_rounds_by_step": counts_by_step(inner_steps, wrapper.resolve_steps(None)),
    }


@torch.no_grad()
def chain_of_thought_answers(
    wrapper: ChunkRefineWrapper, windows: Sequence[Window], batch_size: int, limit: int
) -> pl.DataFrame:
    """Where the base gives the completion of each pair when it may write first (chain of thought,
    greedily).

    Args:
        limit: Tokens that it may write before.

    Returns: document (int), and answer_offset: tokens before the completion, null where it does not
        come.
    """
    found: dict[str, list[int | None]] = {"document": [], "answer_offset": []}
    for batch in batches(windows, batch_size):
        prompt, size = batch[0].chunk_start + 1, batch[0].num_targets
        input_ids = torch.from_numpy(np.stack([w.inputs[:prompt] for w in batch]))
        input_ids = input_ids.to(wrapper.device)
        with wrapper.disabled(), plain_generation(wrapper.base):
            output = wrapper.generate_chunks(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=limit + size,
            )
        for window, row in zip(batch, output[:, prompt:].cpu().numpy(), strict=True):
            answer = window.targets[window.chunk_start :]
            places = (at for at in range(limit + 1) if np.array_equal(row[at:][:size], answer))
            found["document"].append(window.document)
            found["answer_offset"].append(next(places, None))
    return pl.DataFrame(found, schema={"document": pl.Int64, "answer_offset": pl.Int64})
