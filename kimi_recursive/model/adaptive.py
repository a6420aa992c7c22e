"""Verified decoding where every position stops on its own (`halting: expected` or `marginal`).

As `kimi_recursive.model.verified`, but an inner step runs only while a drafted token still needs
it. A step that has not run is behind: what it would have read waits, until a later token of the
chunk needs the step. So each token is the one that token-by-token decoding of the refined model
gives, each stopped at its own step, and what is computed is exactly what a token needs.

A batch is generated row by row: rows stop at different steps.

Shapes: L tokens drafted in a round, N positions that wait, D hidden size, S state size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_recursive.model.halting import Halting
from kimi_recursive.model.loop import ChunkLoop
from kimi_recursive.model.output import GenerationStats, Output, Sampling
from kimi_recursive.model.passes import Passes
from kimi_recursive.model.verified import Lookahead, Pass, Rows, draft, one_pass, start, verify


@dataclass
class Inputs:
    """What an inner step reads, or has yet to read, of one row.

    Attributes:
        ids: Tokens [1, N].
        embeds: [1, N, D].
        states: Cell states of the step before by layer index, each [1, N, S].
    """

    ids: Tensor
    embeds: Tensor
    states: dict[int, Tensor]

    def behind(self, earlier: Inputs | None) -> Inputs:
        """These inputs behind earlier ones."""
        if earlier is None:
            return self
        ids = torch.cat([earlier.ids, self.ids], 1)
        embeds = torch.cat([earlier.embeds, self.embeds], 1)
        states = {i: torch.cat([earlier.states[i], s], 1) for i, s in self.states.items()}
        return Inputs(ids, embeds, states)


@dataclass
class Refined:
    """The inner steps of a round.

    Attributes:
        output: Logits of the drafted tokens, each at the step where it stopped [1, L, V].
        passes: Of the steps that ran.
        num_before: How many waiting inputs each of them read before those of the round.
        following: What the next step would read: that of all inputs of the last one.
    """

    output: Tensor
    passes: list[Pass]
    num_before: list[int]
    following: Inputs


def decode(
    loop: ChunkLoop,
    output: Output,
    num_steps: int | None,
    sampling: Sampling | None,
    stats: GenerationStats,
) -> Iterator[tuple[Rows, list[Inputs | None]]]:
    """As `verified.decode`, for a loop that `halts`.

    Yields: the row that is being generated after each of its rounds, and what waits at each step.

    Args:
        num_steps: The most inner steps, K by default; at least 1.
    """
    num_steps = loop.resolve_steps(num_steps)
    passes, lookahead = loop.passes(), Lookahead(num_steps)
    for row in range(len(output.prompts)):
        rows = start(loop, output, [row], num_steps, passes.takes_back)
        waiting: list[Inputs | None] = [None] * num_steps
        while not output.ended[row]:
            waiting = _round(loop, passes, lookahead, rows, waiting, output, sampling, stats)
            lookahead.num_steps = stats.mean_inner_steps
            yield rows, waiting


def _round(
    loop: ChunkLoop,
    passes: Passes,
    lookahead: Lookahead,
    rows: Rows,
    waiting: list[Inputs | None],
    output: Output,
    sampling: Sampling | None,
    stats: GenerationStats,
) -> list[Inputs | None]:
    """Draft, refine and commit; returns what waits now."""
    (row,), width = rows.index, loop.config.chunk_width
    limit = min(passes.max_tokens, width - int(rows.done), output.remaining(row))
    with stats.timing("draft"):
        drafted, step_0, proposals, drafting = draft(
            passes.run, rows, limit, lookahead, sampling, loop.reads_logits
        )
    with stats.timing("refine"):
        refined = _refine(loop, passes, rows, waiting, drafted, step_0, sampling is None)
        tokens, agreed = verify(drafted, proposals, refined.output, sampling)
    lookahead.learn(agreed.tolist())
    num_drafted, num_agreed, depth = drafted.shape[1], int(agreed), len(refined.passes)
    num_new = output.add(row, tokens[0, : num_agreed + 1].tolist())
    stats.add(1, depth, num_drafted, min(num_new, num_agreed), num_new)
    if output.ended[row]:
        return waiting
    with stats.timing("refine"):
        rows.base = drafting.first([num_new], num_drafted)
        for step, (one, before) in enumerate(zip(refined.passes, refined.num_before, strict=True)):
            rows.refined[step] = one.first([before + num_new], before + num_drafted)
        rows.commit(tokens, [num_new], width)
        if not rows.done:
            rows.refined = [rows.base] * len(waiting)
            return [None] * len(waiting)
        left: list[Inputs | None] = [None] * depth + waiting[depth:]
        if depth < len(waiting):
            kept = refined.num_before[-1] + num_new
            following = refined.following
            states = {i: s[:, :kept] for i, s in following.states.items()}
            more = Inputs(following.ids[:, :kept], following.embeds[:, :kept], states)
            left[depth] = more.behind(waiting[depth])
        return left


def _refine(
    loop: ChunkLoop,
    passes: Passes,
    rows: Rows,
    waiting: list[Inputs | None],
    drafted: Tensor,
    step_0: tuple[Tensor, Tensor | None],
    greedy: bool,
) -> Refined:
    """Inner steps over the inputs of the drafted tokens, until each token that counts has stopped.

    Of greedy decoding that is each one up to the first that has stopped at something else than the
    draft.
    """
    num_new, (h_top, logits) = drafted.shape[1], step_0
    ids = torch.cat([rows.last, drafted[:, :-1]], dim=1)
    following = Inputs(ids, loop.next_inputs(ids, h_top, logits), {})
    done, num_before = [], []
    halting: Halting | None = None
    for origin, earlier in zip(rows.refined, waiting, strict=True):
        now = following.behind(earlier)
        num_before.append(now.ids.shape[1] - num_new)
        states, h_before = loop.next_states(now.states), h_top[:, -num_new:]
        h_top, logits, one = one_pass(passes.run, origin, None, states, inputs_embeds=now.embeds)
        done.append(one)
        halting = loop.next_halting(halting, h_before, h_top[:, -num_new:], logits[:, -num_new:])
        assert halting is not None, "the loop halts"
        counts = torch.ones_like(halting.stopped)
        if greedy:
            rejected = halting.stopped & (halting.output.argmax(-1) != drafted)
            counts = rejected.long().cumsum(1) - rejected.long() == 0
        following = Inputs(now.ids, loop.next_inputs(now.ids, h_top, logits), states)
        if bool((halting.stopped | ~counts).all()):
            break
    assert halting is not None, "a round has an inner step"
    return Refined(halting.output, done, num_before, following)
