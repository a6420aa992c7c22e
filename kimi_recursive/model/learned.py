"""Learned commits: the refined model edits the draft, the boundary head says how much to keep.

Rows commit different lengths, and what the boundary head says depends on the width of the draft, so
each row is generated alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kimi_recursive.model.cache import fork
from kimi_recursive.model.loop import ChunkLoop
from kimi_recursive.model.output import GenerationStats, Output


def decode(wrapper: ChunkLoop, output: Output, stats: GenerationStats) -> None:
    """Fill `output`, row by row."""
    short = wrapper.short_passes()
    run = wrapper.run_base if short is None else short.run
    for row in range(len(output.prompts)):
        _decode_row(wrapper, run, row, output, stats)


def _decode_row(
    wrapper: ChunkLoop, run: Callable, row: int, output: Output, stats: GenerationStats
) -> None:
    """Edit the draft between the inner steps, commit what the boundary head says.

    Stops at a fixed point, at `commit_threshold`, or at K; commits the predicted length, or one
    token when p_commit is below `min_commit_threshold`.
    """
    config = wrapper.config
    prompt = output.prompts[row][None]
    cache = wrapper.encode(prompt[:, :-1], wrapper.new_cache())
    last = prompt[:, -1:]
    while width := min(config.chunk_width, output.remaining(row)):
        with stats.timing("draft"):
            draft = tokens = _draft(run, last, width, cache)
        with stats.timing("refine"):
            chunk = wrapper.start_chunk(torch.cat([last, tokens[:, :-1]], dim=1), cache)
            for _ in range(config.max_inner_steps):
                chunk = wrapper.refine(chunk, torch.cat([last, tokens[:, :-1]], dim=1))
                edited = chunk.logits.argmax(-1)
                fixed = bool((edited == tokens).all())
                tokens = edited
                p_commit, log_length = wrapper.boundary(chunk.h_top)
                if fixed or float(p_commit) >= config.commit_threshold:
                    break
            sure = float(p_commit) >= config.min_commit_threshold
            length = min(max(int(log_length.argmax()) if sure else 1, 1), width)
            num_new = output.add(row, tokens[0, :length].tolist())
            tokens = tokens[:, :num_new]
            run_length = int((tokens == draft[:, :num_new]).long().cumprod(1).sum())
            stats.add(1, chunk.step, width, run_length, num_new)
            cache = wrapper.encode(torch.cat([last, tokens[:, :-1]], dim=1), cache)
            last = tokens[:, -1:]


def _draft(run: Callable, last: Tensor, width: int, cache: Cache) -> Tensor:
    """The base's greedy continuation [1, width] of `last` [1, 1], which `cache` ends before."""
    cache, tokens = fork(cache), [last]
    for _ in range(width):
        logits = run(cache, None, input_ids=tokens[-1])[1]
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens[1:], dim=1)
