"""What generation is told and what it keeps: options, tokens so far, statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation import (
    BaseStreamer,
    LogitsProcessorList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kimi_recursive.model.config import COMMIT_MODES, RecursiveConfig


@dataclass(frozen=True)
class GenerationOptions:
    """How to generate; names and meanings as in transformers' `generate` where it has them.

    Attributes:
        max_new_tokens: Tokens to add at most.
        eos_token_id: Id or ids that end a row; by default those of the base's generation config.
        pad_token_id: Fills ended rows; by default that of the base's generation config.
        commit: `verified` or `learned`; by default the config's. With `verified` a token is
            committed only if the refined model, given the committed prefix, predicts it. The output
            then equals token-by-token decoding of the refined model on the same grid, up to
            rounding where two tokens are equally probable. With `learned` the boundary head
            decides.
        num_steps: Inner steps of `verified`, K by default, and the most of them where every token
            stops on its own; 0 generates with the base alone, through the same passes.
        do_sample: Sample from the refined model instead of taking its most probable token; needs
            `verified`. Drafts are accepted by the rule of speculative sampling (Leviathan et al.,
            arXiv 2211.17192), which keeps the refined model's distribution.
        temperature, top_k, top_p: Of sampling; by default the whole distribution.
        seed: Of sampling; without it torch's global generator draws.
        stop_strings: End a row once its text holds one of them; needs the `tokenizer`.
        tokenizer: Of the base.
    """

    max_new_tokens: int = 20
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    commit: str | None = None
    num_steps: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None
    stop_strings: str | list[str] | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    def __post_init__(self) -> None:
        if self.commit not in (None, *COMMIT_MODES):
            raise ValueError(
                f"commit must be one of {', '.join(COMMIT_MODES)}, got {self.commit!r}"
            )
        if self.commit == "learned" and self.num_steps is not None:
            raise ValueError(
                "num_steps needs commit='verified'; with 'learned' the boundary head decides"
            )
        if self.commit == "learned" and self.do_sample:
            raise ValueError("do_sample needs commit='verified'; 'learned' edits greedily")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer, too")
        if not self.do_sample:
            return
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, got {self.temperature}; greedy is the default"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ValueError(f"top_k must be at least 1, or 0 or None for all, got {self.top_k}")

    def with_defaults(self, config: RecursiveConfig, own: GenerationConfig) -> GenerationOptions:
        """These options with `commit` and the token ids filled in.

        Args:
            own: The generation config of the base.
        """
        eos = own.eos_token_id if self.eos_token_id is None else self.eos_token_id
        eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
        pad = own.pad_token_id if self.pad_token_id is None else self.pad_token_id
        if pad is None:
            pad = eos[0] if eos else 0
        commit = self.commit or config.commit
        return replace(self, eos_token_id=eos, pad_token_id=pad, commit=commit)


@dataclass
class GenerationStats:
    """What generation did. A round is one draft and its refinement; lists have an entry a round.

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
        """Rounds so far."""
        return len(self.inner_steps)

    @property
    def mean_inner_steps(self) -> float:
        """Inner steps of a round, on average."""
        return sum(self.inner_steps) / max(1, self.num_rounds)

    @property
    def mean_committed(self) -> float:
        """Tokens that a row commits in a round, on average."""
        return sum(self.num_committed) / max(1, sum(self.num_rows))

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were committed as they were."""
        return sum(self.num_accepted) / max(1, sum(self.num_drafted))

    def add(self, rows: int, step: int, drafted: int, accepted: int, committed: int) -> None:
        """Add a round: inner steps, and tokens summed over its rows."""
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


class Sampling:
    """Draws tokens: temperature, top-k and top-p in transformers' order, and a random generator.

    Args:
        device: Where logits are.
        options: With `temperature`, `top_k`, `top_p` and `seed`.
    """

    def __init__(self, device: torch.device, options: GenerationOptions):
        self._warpers = LogitsProcessorList()
        if options.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(float(options.temperature)))
        if options.top_k:
            self._warpers.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1.0:
            self._warpers.append(TopPLogitsWarper(float(options.top_p)))
        self._generator = None
        if options.seed is not None:
            self._generator = torch.Generator(device).manual_seed(options.seed)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities [..., V] of logits [..., V], float32."""
        flat = logits.flatten(0, -2).float()
        return cast("Any", self._warpers)(None, flat).softmax(-1).view(logits.shape)

    def draw(self, probabilities: Tensor) -> Tensor:
        """One token for each row of probabilities [B, V]: [B]."""
        return torch.multinomial(probabilities, 1, generator=self._generator)[:, 0]

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers from 0 (included) to 1, with shape and device of `like`."""
        return torch.rand(like.shape, generator=self._generator, device=like.device)


class Output:
    """The tokens committed so far, row by row, and what ends a row.

    Args:
        prompts: Token ids of each row, without padding.
        eos: Ids that end a row; the one that does is the row's last.
        max_new_tokens: Tokens that a row gets at most.
        stop: Ends a row whose text holds a stop string.
        streamer: Gets tokens as they are committed.
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
        """How many tokens a row may still get; 0 when it has ended."""
        return 0 if self.ended[row] else self.max_new_tokens - len(self.tokens[row])

    def add(self, row: int, tokens: Sequence[int]) -> int:
        """Append tokens up to the end of the row.

        Returns: how many were appended.
        """
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
        return bool(cast("Any", self.stop)(ids[None], None)[0])
