"""Learned decoding: the refined model edits the draft, the boundary head says how much to commit.

Each row is generated alone: rows commit different lengths, and the boundary head's answer depends
on the width of the draft.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kimi_recursive.model.cache import fork
from kimi_recursive.model.loop import ChunkLoop
from kimi_recursive.model.output import GenerationStats, Output
from kimi_recursive.model.passes import Passes


def decode(loop: ChunkLoop, output: Output, stats: GenerationStats) -> None:
    """Fill `output` row by row, and `stats` round by round."""
    passes = loop.passes()
    for row in range(len(output.prompts)):
        _decode_row(loop, passes, row, output, stats)


def _decode_row(
    loop: ChunkLoop, passes: Passes, row: int, output: Output, stats: GenerationStats
) -> None:
    """Edit the draft between the inner steps, then commit as many tokens as the boundary head says.

    Stops at a fixed point, at `commit_threshold`, or at K; commits the predicted length, or one
    token when p_commit is below `min_commit_threshold`.
    """
    config, boundary = loop.config, loop.boundary
    assert boundary is not None, "the loop is active"
    prompt = output.prompts[row][None]
    cache = loop.encode(prompt[:, :-1], loop.new_cache())
    last = prompt[:, -1:]
    while width := min(config.chunk_width, output.remaining(row)):
        with stats.timing("draft"):
            draft = tokens = _draft(passes, last, width, cache)
        with stats.timing("refine"):
            chunk = loop.start_chunk(torch.cat([last, tokens[:, :-1]], dim=1), cache)
            while True:
                chunk = loop.refine(chunk, torch.cat([last, tokens[:, :-1]], dim=1))
                edited = chunk.logits.argmax(-1)
                fixed = bool((edited == tokens).all())
                tokens = edited
                p_commit, log_length = boundary(chunk.h_top)
                decided = fixed or float(p_commit) >= config.commit_threshold
                if decided or chunk.step == config.max_inner_steps:
                    break
            sure = float(p_commit) >= config.min_commit_threshold
            length = min(max(int(log_length.argmax()) if sure else 1, 1), width)
            num_new = output.add(row, tokens[0, :length].tolist())
            tokens = tokens[:, :num_new]
            run_length = int((tokens == draft[:, :num_new]).long().cumprod(1).sum())
            stats.add(1, chunk.step, width, run_length, num_new)
            cache = loop.encode(torch.cat([last, tokens[:, :-1]], dim=1), cache)
            last = tokens[:, -1:]


def _draft(passes: Passes, last: Tensor, width: int, cache: Cache) -> Tensor:
    """The base's greedy continuation [1, width] of the token `last` [1, 1], which `cache` has not
    read yet."""
    cache, tokens = fork(cache), [last]
    for _ in range(width):
        logits = passes.run(cache, None, input_ids=tokens[-1])[1]
        tokens.append(logits[:, -1].argmax(-1, keepdim=True))
    return torch.cat(tokens[1:], dim=1)
