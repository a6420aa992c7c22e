"""Chunked generation: the base drafts, the refined model verifies or edits.

Generated tokens are grouped in chunks of W = `chunk_width` on the grid prompt_len + n * W. The
inputs that predict the tokens of a chunk start one position earlier, at prompt_len - 1 + n * W, so
each generated token is predicted by a refined position of its own chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import BaseStreamer, StopStringCriteria

from kimi_recursive.model import adaptive, learned, verified
from kimi_recursive.model.checks import check_context
from kimi_recursive.model.loop import ChunkLoop
from kimi_recursive.model.output import GenerationOptions, GenerationStats, Output, Sampling

OWN_OPTIONS = ("commit", "num_steps")  # of the loop alone; the base has nothing to do with them


@contextmanager
def plain_generation(base: PreTrainedModel) -> Iterator[None]:
    """Inside, `base.generate` follows its arguments alone, not the base's own generation config
    (except for its special tokens)."""
    own = base.generation_config
    base.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        base.generation_config = own


def generate_with_base(
    base: PreTrainedModel,
    input_ids: Tensor | None,
    *,
    seed: int | None = None,
    return_stats: bool = False,
    **keywords: Any,
) -> Any:
    """`base.generate` with the arguments of `generate_chunks`.

    Args:
        seed: Of sampling, as in `GenerationOptions`.
        return_stats: Also return `GenerationStats`, which are empty: there are no rounds.
        keywords: Passed on to `base.generate`, without `commit` and `num_steps`.
    """
    passed = {k: v for k, v in keywords.items() if k not in OWN_OPTIONS}
    with torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        output = cast("Any", base).generate(input_ids, **passed)
    return (output, GenerationStats()) if return_stats else output


@torch.no_grad()
def generate_chunks(
    loop: ChunkLoop,
    input_ids: Tensor,
    max_new_tokens: int = 20,
    attention_mask: Tensor | None = None,
    *,
    streamer: BaseStreamer | None = None,
    return_stats: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, GenerationStats]:
    """Generate with the loop.

    Args:
        loop: A wrapper whose loop is active.
        input_ids: Prompts [B, P], padded on either side where `attention_mask` is 0.
        max_new_tokens: Tokens to add at most.
        attention_mask: [B, P]; all ones by default.
        streamer: Gets the prompt, then tokens as they are committed; for one row.
        return_stats: Also return `GenerationStats`.
        options: The fields of `GenerationOptions`.

    Returns:
        [B, P + n] with n <= max_new_tokens, rows padded after their end; with `return_stats` a
        tuple of that and the statistics.

    Raises:
        ValueError: an empty prompt, more tokens than the base has positions, an option out of its
            range, several rows with a streamer, sampling or a number of steps with `learned`, or
            `learned` where every token stops on its own.
    """
    chosen = GenerationOptions(max_new_tokens=max_new_tokens, **options).with_defaults(
        loop.config, loop.base.generation_config
    )
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be [B, P] with P >= 1, got {tuple(input_ids.shape)}")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer takes one row, got {len(input_ids)}")
    prompts = list(input_ids)
    if attention_mask is not None:
        prompts = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    if empty := [row for row, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"attention_mask: leaves nothing of row {empty[0]}")
    if chosen.commit == "learned" and loop.boundary is None:
        raise ValueError("commit='learned' needs a model with halting 'threshold'")
    longest = max(map(len, prompts)) + max_new_tokens
    check_context(loop.base, longest, "prompt and max_new_tokens")

    eos, pad, stop = chosen.eos_token_id, chosen.pad_token_id, None
    assert isinstance(eos, list) and pad is not None
    if chosen.stop_strings:
        assert chosen.tokenizer is not None
        stop = StopStringCriteria(chosen.tokenizer, chosen.stop_strings)
    output = Output(prompts, max_new_tokens, eos, stop, streamer)
    stats = GenerationStats()
    if streamer is not None:
        streamer.put(input_ids.cpu())
    if chosen.commit == "verified":
        sampling = Sampling(input_ids.device, chosen) if chosen.do_sample else None
        stops = loop.halts and chosen.num_steps != 0
        decode = adaptive.decode if stops else verified.decode
        for _ in decode(loop, output, chosen.num_steps, sampling, stats):
            pass
    else:
        learned.decode(loop, output, stats)
    if streamer is not None:
        streamer.end()
    new = torch.full((len(prompts), max(map(len, output.tokens))), pad)
    for row, tokens in enumerate(output.tokens):
        new[row, : len(tokens)] = torch.tensor(tokens)
    result = torch.cat([input_ids, new.to(input_ids)], dim=1)
    return (result, stats) if return_stats else result
