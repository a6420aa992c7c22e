"""Chunked generation: the base drafts, the refined model verifies or edits.

Generated tokens are grouped in chunks of W = `chunk_width` on the grid prompt_len + n * W. The
inputs that predict the tokens of a chunk start one position earlier, at prompt_len - 1 + n * W, so
each generated token is predicted by a refined position of its own chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    BaseStreamer,
    StopStringCriteria,
)

from kimi_recursive.model import learned, verified
from kimi_recursive.model.config import COMMIT_MODES
from kimi_recursive.model.loop import ChunkLoop
from kimi_recursive.model.output import GenerationStats, Output, Sampling


@contextmanager
def plain_generation(base: PreTrainedModel) -> Iterator[None]:
    """Inside, `base.generate` does nothing but what its arguments say. The base's own generation
    config is put aside, since what an argument leaves unset is taken from there."""
    own = base.generation_config
    base.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=own.eos_token_id, pad_token_id=own.pad_token_id
    )
    try:
        yield
    finally:
        base.generation_config = own


@torch.no_grad()
def generate_chunks(
    wrapper: ChunkLoop,
    input_ids: Tensor,
    max_new_tokens: int = 20,
    attention_mask: Tensor | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    commit: str | None = None,
    num_steps: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer=None,
    streamer: BaseStreamer | None = None,
    return_stats: bool = False,
):
    """Generation with the loop; arguments are called as in transformers' `generate`.

    Args:
        input_ids: Prompts [B, P], padded on either side where `attention_mask` is 0.
        max_new_tokens: Tokens to add at most.
        eos_token_id, pad_token_id: By default those of the base's generation config.
        commit: `verified` (a token is committed only if the refined model, given the committed
            prefix, predicts it: the output equals token-by-token decoding of the refined model on
            the same grid, up to rounding where two tokens are as probable) or `learned` (the
            boundary head decides); the config's by default.
        num_steps: Inner steps of `verified`, K by default; 0 generates with the base alone, through
            the same passes.
        do_sample: Sample from the refined model instead of taking its most probable token. Drafts
            are accepted by the rule of speculative sampling (Leviathan et al., arXiv 2211.17192),
            which leaves the refined model's distribution as it is. For `verified`.
        temperature, top_k, top_p: Of sampling; by default the whole distribution.
        seed: Of sampling; without it torch's global generator draws.
        stop_strings: End a row once its text holds one of them; needs the `tokenizer`.
        streamer: Gets the prompt, then tokens as they are committed; for one row.
        return_stats: Also return `GenerationStats`.

    Returns:
        [B, P + n] with n <= max_new_tokens, rows padded after their end; a tuple with the
        statistics when asked.

    Raises:
        ValueError: an empty prompt, an argument out of its range, several rows with a streamer,
            sampling or a number of steps with `learned`.
    """
    commit = commit or wrapper.config.commit
    if commit not in COMMIT_MODES:
        raise ValueError(f"commit must be one of {', '.join(COMMIT_MODES)}, got {commit!r}")
    if commit == "learned" and num_steps is not None:
        raise ValueError("num_steps needs commit='verified'; learned stops by the boundary head")
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be [B, P] with P >= 1, got {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if streamer is not None and len(input_ids) > 1:
        raise ValueError(f"a streamer takes one row, got {len(input_ids)}")
    if stop_strings and tokenizer is None:
        raise ValueError("stop_strings needs the tokenizer, too")
    sampling = None
    if do_sample:
        if commit == "learned":
            raise ValueError("do_sample needs commit='verified'; learned edits are greedy")
        sampling = Sampling(input_ids.device, temperature, top_k, top_p, seed)

    defaults = wrapper.base.generation_config
    eos = eos_token_id if eos_token_id is not None else defaults.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = pad_token_id if pad_token_id is not None else defaults.pad_token_id
    pad = pad if pad is not None else (eos[0] if eos else 0)
    stop = StopStringCriteria(tokenizer, stop_strings) if stop_strings else None
    prompts = list(input_ids)
    if attention_mask is not None:
        prompts = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    if empty := [row for row, prompt in enumerate(prompts) if not len(prompt)]:
        raise ValueError(f"attention_mask: leaves nothing of row {empty[0]}")

    output, stats = Output(prompts, max_new_tokens, eos, stop, streamer), GenerationStats()
    if streamer is not None:
        streamer.put(input_ids.cpu())
    if commit == "verified":
        for _ in verified.decode(wrapper, output, num_steps, sampling, stats):
            pass
    else:
        learned.decode(wrapper, output, stats)
    if streamer is not None:
        streamer.end()
    new = torch.full((len(prompts), max(map(len, output.tokens))), pad)
    for row, tokens in enumerate(output.tokens):
        new[row, : len(tokens)] = torch.tensor(tokens)
    result = torch.cat([input_ids, new.to(input_ids)], dim=1)
    return (result, stats) if return_stats else result
