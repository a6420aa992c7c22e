"""Verified decoding: the base drafts some tokens, the refined model confirms or corrects them.

The base drafts tokens one after the other. Each inner step then reads the draft in one pass, after
a cache that holds the chunk so far as this step saw it. The draft is committed as far as the
refined model agrees, plus its first correction. So each token is the one that token-by-token
decoding of the refined model gives (with sampling: it has that distribution), whatever was drafted,
and the inner steps are paid once a draft.

Shapes: B rows still generating, L tokens drafted in a round, S positions in the caches, D hidden
size, V vocabulary. Rows are right-aligned in the caches, as left-padded prompts are.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache

from kimi_recursive.model.cache import fork, merge, record, rewind, select_rows, trim, unread
from kimi_recursive.model.guesses import Guesses
from kimi_recursive.model.loop import ChunkLoop
from kimi_recursive.model.output import GenerationStats, Output, Sampling
from kimi_recursive.model.passes import Run


@dataclass
class Rows:
    """The rows that still generate, between two rounds.

    Attributes:
        index: Their rows in the output.
        base: The base's cache of all tokens but the last.
        refined: A cache for each inner step: the states of `base` up to the start of the row's
            chunk, then those of the step.
        length: Tokens of each row in the caches [B]; the longest row fills them.
        done: Tokens of each row's present chunk in the caches [B]; below `chunk_width`.
        last: The last token [B, 1].
        guesses: Of what the base drafts next; None where a pass drafts one token.
    """

    index: list[int]
    base: Cache
    refined: list[Cache]
    length: Tensor
    done: Tensor
    last: Tensor
    guesses: Guesses | None = None

    def mask(self, num_new: int) -> Tensor | None:
        """Attention mask [B, S + num_new]; None when no row is padded."""
        longest = int(self.length.max())
        if bool((self.length == longest).all()):
            return None
        slots = torch.arange(longest + num_new, device=self.length.device)
        return (slots >= longest - self.length[:, None]).long()

    def commit(self, tokens: Tensor, num_new: list[int], chunk_width: int) -> None:
        """Append the first `num_new[row]` of the tokens [B, L] to each row."""
        added = torch.tensor(num_new, device=tokens.device)
        self.last = tokens.gather(1, added[:, None] - 1)
        self.length = self.length + added
        self.done = (self.done + added) % chunk_width
        if self.guesses is not None:
            new = tokens[0].tolist()
            self.guesses.add(new[: num_new[0]], new[num_new[0] :])

    def keep(self, rows: list[int]) -> None:
        """Keep these rows alone, and drop the positions that none of them needs."""
        if len(rows) < len(self.index):
            chosen = torch.tensor(rows, device=self.last.device)
            self.index = [self.index[row] for row in rows]
            self.base = select_rows(self.base, chosen)
            self.refined = [select_rows(cache, chosen) for cache in self.refined]
            self.length, self.done = self.length[chosen], self.done[chosen]
            self.last = self.last[chosen]
        longest = int(self.length.max())
        if self.base.get_seq_length() > longest:
            self.base = trim(self.base, longest)
            self.refined = [trim(cache, longest) for cache in self.refined]


@dataclass
class Pass:
    """A pass over the L inputs of a round that can be taken back in part.

    Attributes:
        cache: The cache after the pass.
        again: Runs the pass over the first n inputs alone; returns the cache after it.
    """

    cache: Cache
    again: Callable[[int], Cache]

    def first(self, keep: list[int], num_read: int) -> Cache:
        """The cache as if each row had read its first `keep[row]` of `num_read` inputs."""
        if (cache := rewind(self.cache, num_read, keep)) is not None:
            return cache
        caches = {n: self.again(n) for n in set(keep)}
        cache = caches.pop(max(keep))
        for n, other in caches.items():
            cache = merge(cache, other, torch.tensor([k == n for k in keep]))
        return cache


class Lookahead:
    """Decides when to stop drafting: when another token would lower the tokens per pass.

    With i drafted tokens a round costs K + i passes and commits E tokens, expected. One more draft
    costs a pass and commits a token with the probability that all drafts before it are accepted.
    Acceptance rates are counted while generating, by the margin of a draft's logit over the
    runner-up.
    """

    EDGES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)
    PRIOR = 0.9  # counts as one draft in each bin

    def __init__(self, num_steps: float):
        self.num_steps = num_steps
        self.num_accepted = [self.PRIOR] * (len(self.EDGES) + 1)
        self.num_tried = [1.0] * len(self.num_accepted)

    def start(self, num_rows: int) -> None:
        """A new round."""
        self.bins: list[list[int]] = []  # by draft token and row
        self.alive = [1.0] * num_rows  # probability that all drafts so far are accepted
        self.expected = 1.0  # the first token is committed or corrected

    def go_on(self, logits: Tensor) -> bool:
        """Whether to draft another token, after one of each row was drafted from logits [B, V]."""
        top = logits.topk(2, dim=-1).values.tolist()
        self.bins.append([bisect(self.EDGES, first - second) for first, second in top])
        rates = (self.num_accepted[i] / self.num_tried[i] for i in self.bins[-1])
        self.alive = [alive * rate for alive, rate in zip(self.alive, rates, strict=True)]
        gain = sum(self.alive) / len(self.alive)
        if gain * (self.num_steps + len(self.bins)) <= self.expected:
            return False
        self.expected += gain
        return True

    def learn(self, num_agreed: list[int]) -> None:
        """Count a round: how many drafts of each row were accepted before the first rejection."""
        for i, bins in enumerate(self.bins):
            for bin_, agreed in zip(bins, num_agreed, strict=True):
                self.num_accepted[bin_] += i < agreed
                self.num_tried[bin_] += i <= agreed


def decode(
    loop: ChunkLoop,
    output: Output,
    num_steps: int | None,
    sampling: Sampling | None,
    stats: GenerationStats,
) -> Iterator[Rows]:
    """Fill `output` round by round; yields the rows that still generate after each round.

    Args:
        num_steps: Inner steps, K by default.
        sampling: How to draw tokens; None for greedy decoding.
    """
    num_steps = loop.resolve_steps(num_steps)
    base = loop.passes()
    run = base.run
    lookahead = Lookahead(num_steps or loop.config.max_inner_steps)
    rows = start(loop, output, range(len(output.prompts)), num_steps or 1, base.takes_back)
    while True:
        # No row reads beyond its end, where the base may have no position. What a row reads beyond
        # its chunk is not used.
        room = loop.config.chunk_width - rows.done
        limit = min(base.max_tokens, int(room.max()), *map(output.remaining, rows.index))
        with stats.timing("draft"):
            keep_logits = loop.reads_logits and num_steps > 0
            drafted, step_0, proposals, drafting = draft(
                run, rows, limit, lookahead, sampling, keep_logits
            )
        with stats.timing("refine"):
            logits, passes = _refine(loop, run, rows, num_steps, drafted, *step_0)
            tokens, agreed = verify(drafted, proposals, logits, sampling)
        lookahead.learn(agreed.tolist())
        num_new = torch.minimum((agreed + 1).clamp(max=drafted.shape[1]), room).tolist()
        num_new = [
            output.add(row, new[:n].tolist())
            for row, n, new in zip(rows.index, num_new, tokens, strict=True)
        ]
        num_accepted = sum(min(n, a) for n, a in zip(num_new, agreed.tolist(), strict=True))
        stats.add(len(num_new), num_steps, drafted.numel(), num_accepted, sum(num_new))
        if not (left := [i for i, row in enumerate(rows.index) if not output.ended[row]]):
            return
        with stats.timing("refine"):
            _advance(rows, [drafting, *passes], tokens, num_new, loop.config.chunk_width)
            rows.keep(left)
        yield rows


def start(
    loop: ChunkLoop, output: Output, index: Iterable[int], num_caches: int, takes_back: bool
) -> Rows:
    """These rows of the output after their prompts, each cache as the base has read them; of a
    single row, with guesses if a pass `takes_back` tokens."""
    index = list(index)
    prompts = [output.prompts[row] for row in index]
    length = torch.tensor([len(ids) - 1 for ids in prompts], device=prompts[0].device)
    longest = int(length.max())
    ids = torch.stack([F.pad(ids, (longest + 1 - len(ids), 0)) for ids in prompts])
    cache = loop.new_cache()
    rows = Rows(index, cache, [], length, torch.zeros_like(length), ids[:, -1:])
    rows.base = loop.encode(ids[:, :-1], cache, rows.mask(0))
    rows.refined = [rows.base] * num_caches
    if takes_back and len(index) == 1:
        rows.guesses = Guesses(prompts[0].tolist())
    return rows


def draft(
    run: Run,
    rows: Rows,
    limit: int,
    lookahead: Lookahead,
    sampling: Sampling | None,
    keep_logits: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor | None], Tensor | None, Pass]:
    """The base drafts up to `limit` tokens, one a pass, or as many as `rows.guesses` has right.

    Returns: tokens [B, L]; of their inputs the top hidden states [B, L, D] and, with `keep_logits`,
        the logits [B, L, V]; with sampling the distributions that the tokens were drawn from
        [B, L, V]; and the pass.
    """
    origin, mask = rows.base, rows.mask(limit)
    cache, feed, guesses = record(origin), rows.last, rows.guesses
    inputs, tokens, tops, kept, proposals = [], [], [], [], []
    said: list[int] = []  # the tokens, where there are guesses
    lookahead.start(len(feed))
    going = True
    while going:
        guess = [] if guesses is None else guesses.next(said)
        guess = guess[: limit - len(tokens) - 1]
        read = torch.cat([feed, feed.new_tensor([guess])], 1) if guess else feed
        num_read = read.shape[1]
        h_top, logits = run(cache, _shortened(mask, limit - len(tokens) - num_read), input_ids=read)
        for i in range(num_read):
            inputs.append(read[:, i : i + 1])
            tops.append(h_top[:, i : i + 1])
            now = logits[:, i : i + 1]
            if keep_logits:
                kept.append(now)
            if sampling is None:
                feed = now[:, -1].argmax(-1, keepdim=True)
            else:
                proposals.append(sampling.probabilities(now))
                feed = sampling.draw(proposals[-1][:, -1])[:, None]
            tokens.append(feed)
            if guesses is not None:
                said.append(int(feed))
            going = lookahead.go_on(now[:, -1]) and len(tokens) < limit
            if not going or i == len(guess) or said[-1] != guess[i]:
                unread(cache, len(guess) - i)
                if guesses is not None and guess:
                    guesses.learn(i)
                break

    def again(n: int) -> Cache:
        cache = fork(origin)
        run(cache, _shortened(mask, limit - n), input_ids=torch.cat(inputs[:n], 1))
        return cache

    drawn_from = torch.cat(proposals, 1) if proposals else None
    step_0 = torch.cat(tops, 1), torch.cat(kept, 1) if kept else None
    return torch.cat(tokens, 1), step_0, drawn_from, Pass(cache, again)


def _shortened(mask: Tensor | None, by: int) -> Tensor | None:
    return None if mask is None else mask[:, : mask.shape[1] - by]


def _refine(
    loop: ChunkLoop,
    run: Run,
    rows: Rows,
    num_steps: int,
    drafted: Tensor,
    h_top: Tensor,
    logits: Tensor | None,
) -> tuple[Tensor, list[Pass]]:
    """Read the inputs of the drafted tokens at every inner step.

    With `num_steps` 0 the base reads them, which equals a step with untrained cells bit for bit.

    Args:
        h_top, logits: Of these inputs at step 0; logits only where a step reads them.

    Returns: logits of the last step [B, L, V], and the pass of each step.
    """
    mask, inputs = rows.mask(drafted.shape[1]), torch.cat([rows.last, drafted[:, :-1]], dim=1)
    if not num_steps:
        _, logits, one = one_pass(run, rows.refined[0], mask, input_ids=inputs)
        return logits, [one]
    states: dict[int, Tensor] = {}
    passes: list[Pass] = []
    for step, origin in enumerate(rows.refined, 1):
        embeds = loop.next_inputs(inputs, h_top, logits)
        states = loop.next_states(states)
        wanted = 0 if step == num_steps or loop.reads_logits else 1  # of logits: 0 is all
        h_top, logits, one = one_pass(run, origin, mask, states, wanted, inputs_embeds=embeds)
        passes.append(one)
    assert logits is not None, "a round has an inner step"
    return logits, passes


def one_pass(
    run: Run,
    origin: Cache,
    mask: Tensor | None,
    states: dict[int, Tensor] | None = None,
    logits_to_keep: int = 0,
    **inputs: Tensor,
) -> tuple[Tensor, Tensor, Pass]:
    """One pass after the cache `origin`, which is not changed; `states` are updated.

    Returns: top hidden state [B, L, D], logits [B, L, V], and the pass.
    """
    before = None if states is None else dict(states)

    def again(n: int) -> Cache:
        cache, (num_read,) = fork(origin), {x.shape[1] for x in inputs.values()}
        part = None if before is None else {index: s[:, :n] for index, s in before.items()}
        first = {name: x[:, :n] for name, x in inputs.items()}
        run(cache, _shortened(mask, num_read - n), part, **first)
        return cache

    cache = record(origin)
    h_top, logits = run(cache, mask, states, **inputs, logits_to_keep=logits_to_keep)
    return h_top, logits, Pass(cache, again)


def verify(
    drafted: Tensor, proposals: Tensor | None, logits: Tensor, sampling: Sampling | None
) -> tuple[Tensor, Tensor]:
    """Compare the drafts with the refined model.

    Returns: tokens [B, L], valid up to and including the first that differs from the draft, and the
        number of accepted drafts before it [B].
    """
    if sampling is None:
        tokens = logits.argmax(-1)
        return tokens, (tokens == drafted).long().cumprod(1).sum(1)
    assert proposals is not None
    target, num_read = sampling.probabilities(logits), drafted.shape[1]
    p, q = (x.gather(-1, drafted[..., None])[..., 0] for x in (target, proposals))
    agreed = (sampling.uniform(q) * q < p).long().cumprod(1).sum(1)
    first = agreed.clamp(max=num_read - 1)[:, None]  # where the first rejection is, if there is one
    target, proposal = (x.take_along_dim(first[..., None], 1)[:, 0] for x in (target, proposals))
    rest = (target - proposal).clamp(min=0)
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, target)
    corrected = torch.where(agreed < num_read, sampling.draw(rest), drafted.gather(1, first)[:, 0])
    return drafted.scatter(1, first, corrected[:, None]), agreed


def _advance(
    rows: Rows, passes: list[Pass], tokens: Tensor, num_new: list[int], chunk_width: int
) -> None:
    """Commit the first `num_new[row]` tokens of each row and take the rest out of the caches."""
    rows.base, *rows.refined = (one.first(num_new, tokens.shape[1]) for one in passes)
    rows.commit(tokens, num_new, chunk_width)
    at_start = rows.done == 0
    if bool(at_start.any()):
        rows.refined = [merge(cache, rows.base, at_start) for cache in rows.refined]
