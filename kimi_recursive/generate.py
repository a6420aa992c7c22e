"""Chunked generation: the base drafts, the refined model verifies or edits.

Generated tokens are grouped in chunks of W = `chunk_width` on the grid prompt_len + n * W. The
inputs that predict the tokens of a chunk start one position earlier, at prompt_len - 1 + n * W, so
each generated token is predicted by a refined position of its own chunk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import (
    BaseStreamer,
    LogitsProcessorList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kimi_recursive.config import COMMIT_MODES
from kimi_recursive.model import ChunkRefineWrapper


@dataclass
class GenerationStats:
    """What generation did. Lists have an entry a round; a round is one draft and its refinement.

    Attributes:
        num_rows: Rows that were still generating.
        inner_steps: Inner steps run.
        num_drafted: Tokens drafted, summed over rows.
        num_accepted: Drafted tokens committed as they were, summed over rows.
        num_committed: Tokens committed, summed over rows.
        draft_seconds, refine_seconds: Time in the base's drafts, and in the inner steps.
    """

    num_rows: list[int] = field(default_factory=list)
    inner_steps: list[int] = field(default_factory=list)
    num_drafted: list[int] = field(default_factory=list)
    num_accepted: list[int] = field(default_factory=list)
    num_committed: list[int] = field(default_factory=list)
    draft_seconds: float = 0.0
    refine_seconds: float = 0.0

    @property
    def num_rounds(self) -> int:
        return len(self.inner_steps)

    @property
    def mean_inner_steps(self) -> float:
        """Inner steps of a round."""
        return sum(self.inner_steps) / max(1, self.num_rounds)

    @property
    def mean_committed(self) -> float:
        """Tokens that a row commits in a round."""
        return sum(self.num_committed) / max(1, sum(self.num_rows))

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were committed as they were."""
        return sum(self.num_accepted) / max(1, sum(self.num_drafted))

    def add(self, rows: int, step: int, drafted: int, accepted: int, committed: int) -> None:
        """One round."""
        self.num_rows.append(rows)
        self.inner_steps.append(step)
        self.num_drafted.append(drafted)
        self.num_accepted.append(accepted)
        self.num_committed.append(committed)

    @contextmanager
    def timing(self, part: str) -> Iterator[None]:
        """Add the time inside to `<part>_seconds`."""
        started = time.perf_counter()
        yield
        name = f"{part}_seconds"
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)


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


class Sampling:
    """Temperature, top-k and top-p, in transformers' order, and what draws."""

    def __init__(
        self,
        device: torch.device,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        seed: int | None = None,
    ):
        if not temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {temperature}; greedy is the default"
            )
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
        if top_k is not None and top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 or None for all, got {top_k}")
        self._warpers = LogitsProcessorList()
        if temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self._warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(float(top_p)))
        self._generator = None
        if seed is not None:
            self._generator = torch.Generator(device).manual_seed(seed)

    def probabilities(self, logits: Tensor) -> Tensor:
        """[..., V] of logits [..., V]."""
        flat = logits.flatten(0, -2).float()
        return self._warpers(None, flat).softmax(-1).view(logits.shape)

    def draw(self, probabilities: Tensor) -> Tensor:
        """One token for each row of [B, V]."""
        return torch.multinomial(probabilities, 1, generator=self._generator)[:, 0]

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform on [0, 1) of the shape of `like`."""
        return torch.rand(like.shape, generator=self._generator, device=like.device)


class Output:
    """The tokens committed so far, row by row, and what ends a row.

    Args:
        prompts: Token ids of each row, without padding.
        eos: Ids that end a row; the one that does is the row's last.
        stop: Ends a row whose text has come to a stop string.
    """

    def __init__(
        self,
        prompts: Sequence[Tensor],
        max_new_tokens: int,
        eos: Sequence[int],
        stop: StopStringCriteria | None = None,
        streamer: BaseStreamer | None = None,
    ):
        self.prompts, self.max_new_tokens = prompts, max_new_tokens
        self.eos, self.stop, self.streamer = set(eos), stop, streamer
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.ended = [False] * len(prompts)

    def remaining(self, row: int) -> int:
        """Tokens that a row may still get."""
        return 0 if self.ended[row] else self.max_new_tokens - len(self.tokens[row])

    def add(self, row: int, tokens: Sequence[int]) -> int:
        """Append tokens up to the end of the row; returns how many that were."""
        mine, before = self.tokens[row], len(self.tokens[row])
        for token in tokens[: self.remaining(row)]:
            mine.append(token)
            if token in self.eos or self._at_stop_string(row):
                self.ended[row] = True
                break
        self.ended[row] |= len(mine) == self.max_new_tokens
        if self.streamer is not None and len(mine) > before:
            self.streamer.put(torch.tensor(mine[before:]))
        return len(mine) - before

    def _at_stop_string(self, row: int) -> bool:
        if self.stop is None:
            return False
        prompt = self.prompts[row]
        ids = torch.cat([prompt, torch.tensor(self.tokens[row], device=prompt.device)])
        return bool(self.stop(ids[None], None)[0])


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
        from kimi_recursive.verified import decode

        for _ in decode(wrapper, output, num_steps, sampling, stats):
            pass
    else:
        from kimi_recursive.learned import decode

        decode(wrapper, output, stats)
    if streamer is not None:
        streamer.end()
    new = torch.full((len(prompts), max(map(len, output.tokens))), pad)
    for row, tokens in enumerate(output.tokens):
        new[row, : len(tokens)] = torch.tensor(tokens)
    result = torch.cat([input_ids, new.to(input_ids)], dim=1)
    return (result, stats) if return_stats else result
