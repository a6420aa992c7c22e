"""What generation keeps: how tokens are drawn, the tokens so far, statistics."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.generation import (
    BaseStreamer,
    LogitsProcessorList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


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
