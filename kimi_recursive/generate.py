"""Chunked generation: the base drafts a chunk, the refined model verifies or edits it.

Generated tokens are grouped in chunks of W = `chunk_width` on the grid prompt_len + n * W. The
inputs that predict the tokens of a chunk start one position earlier, at prompt_len - 1 + n * W, so
each generated token is predicted by a refined position of its own chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kimi_recursive.cache import fork
from kimi_recursive.config import COMMIT_MODES
from kimi_recursive.model import ChunkRefineWrapper


@dataclass
class GenerationStats:
    """What generation did. Lists have an entry a round; a round is one draft and its refinement.

    Attributes:
        inner_steps: Inner steps run.
        num_drafted: Tokens drafted, summed over rows.
        num_accepted: Drafted tokens committed as they were, summed over rows.
        num_committed: Tokens committed, summed over rows.
    """

    inner_steps: list[int] = field(default_factory=list)
    num_drafted: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)
    num_committed: list[int] = field(default_factory=list)

    def add(self, step: int, drafted: Tensor, accepted: Tensor, committed: Tensor) -> None:
        """One round; counts [B]."""
        self.inner_steps.append(step)
        self.num_drafted.append(int(drafted.sum()))
        self.num_accepted.append(int(accepted.clamp(min=0).sum()))
        self.num_committed.append(int(committed.sum()))


@torch.no_grad()
def generate_chunks(
    wrapper: ChunkRefineWrapper,
    input_ids: Tensor,
    max_new_tokens: int = 20,
    attention_mask: Tensor | None = None,
    eos_token_id: int | list[int] | None = None,
    pad_token_id: int | None = None,
    commit: str | None = None,
    num_steps: int | None = None,
    do_sample: bool = False,
    return_stats: bool = False,
):
    """Greedy generation with the loop.

    Args:
        input_ids: Prompts [B, P], padded on the left where `attention_mask` is 0.
        max_new_tokens: Tokens to add at most.
        eos_token_id, pad_token_id: By default those of the base's generation config.
        commit: `verified` (a token is committed only if the refined model, given the committed
            prefix, predicts it: the output equals token-by-token decoding of the refined model on
            the same grid) or `learned` (the boundary head decides); the config's by default.
        num_steps: Inner steps of `verified`, K by default; 0 generates with the base alone, through
            the same passes.
        do_sample: Sampling is not available with the loop yet.
        return_stats: Also return `GenerationStats`.

    Returns:
        [B, P + n] with n <= max_new_tokens, rows padded after their end; a tuple with the
        statistics when asked.

    Raises:
        ValueError: an empty prompt, unknown commit mode, sampling, right-padded prompts.
    """
    commit = commit or wrapper.config.commit
    if commit not in COMMIT_MODES:
        raise ValueError(f"commit must be one of {', '.join(COMMIT_MODES)}, got {commit!r}")
    if do_sample:
        raise ValueError("do_sample=True is not available with recursion enabled; use greedy")
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids must be [B, P] with P >= 1, got {tuple(input_ids.shape)}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if attention_mask is not None:
        if not bool(attention_mask[:, -1].all()):
            raise ValueError("prompts must be padded on the left")
        attention_mask = None if bool(attention_mask.all()) else attention_mask
    defaults = wrapper.base.generation_config
    eos = eos_token_id if eos_token_id is not None else defaults.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    pad = pad_token_id if pad_token_id is not None else defaults.pad_token_id
    pad = pad if pad is not None else (eos[0] if eos else 0)

    end = _End(torch.tensor(eos, dtype=torch.long, device=input_ids.device), pad)

    stats = GenerationStats()
    if commit == "verified":
        new = _verified(wrapper, input_ids, attention_mask, max_new_tokens, num_steps, end, stats)
    else:  # rows commit different lengths, so each row has a grid of its own
        rows = []
        for i, row in enumerate(input_ids):
            first = 0 if attention_mask is None else int(attention_mask[i].argmax())
            rows.append(_learned(wrapper, row[None, first:], max_new_tokens, end, stats)[0])
        new = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    output = torch.cat([input_ids, end.pad_rows(new)], dim=1)
    return (output, stats) if return_stats else output


@dataclass
class _End:
    """How rows end: tokens behind a row's first EOS are padding."""

    eos: Tensor
    pad: int

    def behind(self, tokens: Tensor) -> Tensor:
        """Bool [B, n]: positions behind the first EOS of their row."""
        is_eos = torch.isin(tokens, self.eos)
        return (is_eos.cumsum(1) - is_eos.long()) > 0

    def reached(self, tokens: Tensor) -> Tensor:
        """Bool [B]: rows that hold an EOS."""
        return torch.isin(tokens, self.eos).any(1)

    def pad_rows(self, tokens: Tensor) -> Tensor:
        behind = self.behind(tokens)
        longest = int((~behind).sum(1).max())
        return tokens.masked_fill(behind, self.pad)[:, :longest]


def _extend(mask: Tensor | None, num_tokens: int) -> Tensor | None:
    return None if mask is None else torch.nn.functional.pad(mask, (0, num_tokens), value=1)


def _draft(
    wrapper: ChunkRefineWrapper,
    last: Tensor,
    tokens: Tensor,
    committed: Tensor,
    cache: Cache,
    mask: Tensor | None,
) -> Tensor:
    """The base's greedy continuation of each row, one token at a time.

    Args:
        last: The token before the chunk [B, 1]; `cache` and `mask` end before and with it.
        tokens: [B, W]; the first `committed[row]` of a row are kept, the rest is drafted.
    """
    tokens = tokens.clone()
    start, width = int(committed.min()), tokens.shape[1]
    cache, feed = fork(cache), torch.cat([last, tokens[:, :start]], dim=1)
    for slot in range(start, width):
        logits = wrapper.read(feed, cache, _extend(mask, slot))
        keep = slot < committed
        tokens[:, slot] = torch.where(keep, tokens[:, slot], logits[:, -1].argmax(-1))
        feed = tokens[:, slot : slot + 1]
    return tokens


def _verified(
    wrapper: ChunkRefineWrapper,
    input_ids: Tensor,
    mask: Tensor | None,
    max_new_tokens: int,
    num_steps: int | None,
    end: _End,
    stats: GenerationStats,
) -> Tensor:
    """Draft, refine all K steps on the fixed draft, commit the run that the refined model predicts
    and its correction behind it, draft the rest anew, until each chunk is complete.

    Each round commits at least one token a row. Taking the refined predictions as the draft of the
    rest instead (Jacobi decoding) needs 7 to 14 times the rounds (docs/log.md)."""
    batch = input_ids.shape[0]
    prefix_mask = None if mask is None else mask[:, :-1]
    cache = wrapper.encode(input_ids[:, :-1], wrapper.new_cache(), prefix_mask)
    last = input_ids[:, -1:]
    new = input_ids.new_empty(batch, 0)
    while new.shape[1] < max_new_tokens and not bool(end.reached(new).all()):
        width = min(wrapper.config.chunk_width, max_new_tokens - new.shape[1])
        tokens = input_ids.new_zeros(batch, width)
        committed = torch.where(end.reached(new), width, 0)
        chunk_mask = _extend(mask, new.shape[1])
        slots = torch.arange(width, device=tokens.device)
        while bool((committed < width).any()):
            tokens = _draft(wrapper, last, tokens, committed, cache, chunk_mask)
            inputs = torch.cat([last, tokens[:, :-1]], dim=1)
            chunk = wrapper.start_chunk(inputs, cache, _extend(chunk_mask, width - 1))
            chunk = wrapper.last_step(chunk, num_steps)
            predicted = chunk.logits.argmax(-1)
            agrees = (predicted == tokens) | (slots < committed[:, None])
            run = agrees.long().cumprod(1).sum(1)
            open_rows = committed < width
            tokens = torch.where(open_rows[:, None] & (slots == run[:, None]), predicted, tokens)
            after = (run + 1).clamp(max=width)
            ended = torch.isin(tokens, end.eos) & (slots < after[:, None])
            after = torch.where(ended.any(1), width, after)
            stats.add(chunk.step, (width - committed), run - committed, after - committed)
            committed = torch.where(open_rows, after, committed)
        cache, last = chunk.committed, tokens[:, -1:]
        new = torch.cat([new, tokens], dim=1)
    return new


def _learned(
    wrapper: ChunkRefineWrapper,
    input_ids: Tensor,
    max_new_tokens: int,
    end: _End,
    stats: GenerationStats,
) -> Tensor:
    """One row [1, P]: edit the draft between the inner steps, commit what the boundary head says.

    Stops at a fixed point, at `commit_threshold`, or at K; commits the predicted length, or one
    token when p_commit is below `min_commit_threshold`.
    """
    config = wrapper.config
    cache = wrapper.encode(input_ids[:, :-1], wrapper.new_cache())
    last = input_ids[:, -1:]
    new = input_ids.new_empty(1, 0)
    none = torch.zeros(1, dtype=torch.long, device=input_ids.device)
    while new.shape[1] < max_new_tokens and not bool(end.reached(new)):
        width = min(config.chunk_width, max_new_tokens - new.shape[1])
        draft = _draft(wrapper, last, input_ids.new_zeros(1, width), none, cache, None)
        tokens = draft
        chunk = wrapper.start_chunk(torch.cat([last, tokens[:, :-1]], dim=1), cache)
        for _ in range(config.max_inner_steps):
            chunk = wrapper.refine(chunk, torch.cat([last, tokens[:, :-1]], dim=1))
            edited = chunk.logits.argmax(-1)
            fixed = bool((edited == tokens).all())
            tokens = edited
            p_commit, log_length = wrapper.boundary(chunk.h_top)
            if fixed or float(p_commit) >= config.commit_threshold:
                break
        length = int(log_length.argmax()) if float(p_commit) >= config.min_commit_threshold else 1
        length = min(max(length, 1), width)
        tokens = tokens[:, :length]
        run = (tokens == draft[:, :length]).long().cumprod(1).sum(1)
        stats.add(chunk.step, none + width, run, none + length)
        cache = wrapper.encode(torch.cat([last, tokens[:, :-1]], dim=1), cache)
        last, new = tokens[:, -1:], torch.cat([new, tokens], dim=1)
    return new
