"""Draft-repair training of one chunk: the six losses.

Between inner steps the draft (`training.draft`) is treated exactly as generation treats it: with
`commit="verified"` it stays as it is, with `commit="learned"` editable inputs take the refined
prediction.

Shapes: B batch, W chunk width, V vocabulary, K inner steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kimi_recursive.model.halting import Halting
from kimi_recursive.model.loop import ChunkState
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.processes import distributed
from kimi_recursive.training.batches import Batch
from kimi_recursive.training.draft import Draft, Draw, corrupt, corruption_rate_at, edit
from kimi_recursive.training.settings import PhaseSettings

# Logits of more numbers than this (256 MiB in float32) meet their losses a few rows at a time.
SLICE = 2**26


def _mean(values: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """A part of the mean over the masked values of the whole batch, of which each part has `count`
    on average: the average over the parts is that mean."""
    return (values * mask.to(values.dtype)).sum() / count.to(values)


class DraftRepair(nn.Module):
    """The objective of the phases: refine one chunk of each window and sum the weighted losses.
    Without inner steps (the vanilla arms) the base itself trains on the same chunk, as it is.

    Args:
        wrapper: With recursion enabled.
        num_steps: Optimizer steps of the whole run, for the corruption schedule.
        own_share: Share of corruptions taken from the base's own predictions.
        seed: Chunk position and corruption are pure functions of (seed, step).
        scheduled_sampling: Share of draft tokens taken from the model's own draft by the end of
            training; it grows linearly from 0.
        pull: Weight of the L2 pull of unfrozen layers to their pretrained weights.
        recompute: Keep no activations of an inner step: its backward runs it again.
    """

    def __init__(
        self,
        wrapper: ChunkRefineWrapper,
        num_steps: int,
        own_share: float,
        seed: int,
        scheduled_sampling: float = 0.0,
        pull: float = 0.0,
        recompute: bool = False,
    ):
        super().__init__()
        self.wrapper = wrapper
        self.num_steps = num_steps
        self.own_share = own_share
        self.seed = seed
        self.scheduled_sampling = scheduled_sampling
        self.pull = pull
        self.recompute = recompute
        adapter = wrapper.adapter
        self.unfrozen = list(adapter.layer_parameters().items()) if adapter else []
        self.vanilla = not wrapper.config.max_inner_steps
        self.base_trains = any(p.requires_grad for p in wrapper.base.parameters())

    def draw(self, batch: Batch, step: int) -> Draw:
        """What a step does with a batch."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        width = self.wrapper.config.chunk_width
        start = batch.chunk_start
        if start is None:
            num_chunks = batch.inputs.shape[1] // width
            start = width * int(torch.randint(num_chunks, (), generator=generator))
        progress = step / max(1, self.num_steps - 1)
        rate = corruption_rate_at(self.wrapper.config, progress)
        sampling = 0.0 if self.vanilla else self.scheduled_sampling * progress
        return Draw(start, rate, sampling, generator)

    def first_pass(self, batch: Batch, start: int) -> tuple[ChunkState, Batch]:
        """The chunk of each row that starts at `start`, after step 0 and as it is."""
        chunk = batch.chunk(start, self.wrapper.config.chunk_width)
        before = None if batch.mask is None else batch.mask[:, :start]
        with torch.no_grad():
            prefix = self.wrapper.encode(batch.inputs[:, :start], self.wrapper.new_cache(), before)
        run = _again if self.recompute and torch.is_grad_enabled() else _once
        return run(self.wrapper.start_chunk, chunk.inputs, prefix, chunk.mask), chunk

    def forward(
        self, batch: Batch, step: int, part: tuple[int, int] = (0, 1)
    ) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The losses of a batch, or of one of the equal parts that it is cut into; the average over
        the parts is that of the batch.

        Args:
            batch: Its rows are whole chunks.
            step: The optimizer step, from 0.
            part: Which part of how many.

        Returns: the weighted sum, and each loss by name, with the corruption rate and `tokens`,
            whose sum over the parts is that of the batch.
        """
        config, wrapper = self.wrapper.config, self.wrapper
        drawn = self.draw(batch, step)
        with torch.set_grad_enabled(self.vanilla and torch.is_grad_enabled()):
            base, chunk = self.first_pass(batch, drawn.start)
        with torch.no_grad():
            predicted, vocab_size = base.logits.argmax(-1), base.logits.shape[-1]
            draft = corrupt(chunk, predicted, drawn, self.own_share, vocab_size, part)
        # A single pass does not read step 0. A frozen base needs it again only for another draft.
        if not (self.vanilla or config.single_pass) and (self.base_trains or not drawn.clean):
            with torch.set_grad_enabled(self.base_trains and torch.is_grad_enabled()):
                run = _again if self.recompute and self.base_trains else _once
                base = run(wrapper.start_chunk, draft.inputs, base.prefix, base.mask)
        trains_step_0 = self.base_trains and not config.single_pass
        losses = chunk_losses(wrapper, base, draft, trains_step_0, self.recompute)
        weights = {
            "final": config.lambda_final,
            "masked": config.lambda_masked,
            "halt": config.lambda_halt,
            "len": config.lambda_len,
            "ponder": config.lambda_ponder,
            "stability": config.lambda_stability,
        }
        if self.unfrozen:
            losses["pull"] = self.distance()
            weights["pull"] = self.pull
        total = sum(weights[name] * loss for name, loss in losses.items())
        assert isinstance(total, Tensor)
        parts = {f"loss_{name}": loss.detach() for name, loss in losses.items()}
        schedule = {"corruption_rate": drawn.rate, "sampling_rate": drawn.sampling}
        if chunk.num_targets is None:
            num_tokens = draft.targets.numel() * distributed.num_processes()
        else:  # of the whole batch
            num_tokens = 0 if part[0] else int(chunk.num_targets.sum())
        return total, parts | schedule | {"tokens": num_tokens}

    def distance(self) -> Tensor:
        """Half the squared distance of the unfrozen layers to their pretrained weights (elastic
        weight consolidation with the identity for the Fisher matrix: Kirkpatrick et al., 2017)."""
        adapter = self.wrapper.adapter
        assert adapter is not None, "unfrozen layers are in an adapter"
        distance = sum(
            ((p.float() - adapter.pretrained[name].to(p.device).float()).square().sum() / 2).to(
                self.wrapper.device
            )
            for name, p in self.unfrozen
        )
        assert isinstance(distance, Tensor)
        return distance


def build_objective(
    wrapper: ChunkRefineWrapper, num_steps: int, settings: PhaseSettings, seed: int
) -> DraftRepair:
    """The objective of a phase over `num_steps` steps."""
    return DraftRepair(
        wrapper,
        num_steps,
        settings.own_draft_share,
        seed,
        settings.scheduled_sampling or 0.0,
        settings.l2_pull or 0.0,
        settings.gradient_checkpointing,
    )


def _once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _again(function: Callable[..., Any], *arguments: Any) -> Any:
    """As `_once`, but what its backward needs is computed again, not kept. The function draws
    nothing at random and writes into nothing that it is given, so it gives the same bits."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def _compare(logits: Tensor, targets: Tensor, before: Tensor | None) -> tuple[Tensor, ...]:
    """Cross-entropy of logits [B, W, V] with targets [B, W], and with the logits of the step before
    KL(step before || this step) without its gradient there; each [B, W], float32."""
    log_probs = logits.float().log_softmax(-1)
    ce = -log_probs.gather(-1, targets[..., None]).squeeze(-1)
    if before is None:
        return (ce,)
    earlier = before.float().log_softmax(-1)
    return ce, F.kl_div(log_probs, earlier, log_target=True, reduction="none").sum(-1)


def _in_slices(logits: Tensor, targets: Tensor, before: Tensor | None) -> tuple[Tensor, ...]:
    """As `_compare`; of large logits no float32 copy stays, only one of a few rows at a time."""
    rows = max(1, SLICE * len(logits) // logits.numel())
    if rows >= len(logits):
        return _compare(logits, targets, before)
    earlier = [None] * len(logits) if before is None else before.split(rows)
    slices = zip(logits.split(rows), targets.split(rows), earlier, strict=False)
    parts = [_again(_compare, *one) for one in slices]
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def _refine(
    wrapper: ChunkRefineWrapper, chunk: ChunkState, inputs: Tensor, targets: Tensor
) -> tuple[ChunkState, tuple[Tensor, ...]]:
    """The next inner step, and its losses as in `_compare`; compared with the steps from 1 on."""
    after = wrapper.refine(chunk, inputs)
    before = chunk.logits.detach() if chunk.step else None
    return after, _in_slices(after.logits, targets, before)


def chunk_losses(
    wrapper: ChunkRefineWrapper,
    chunk: ChunkState,
    draft: Draft,
    trains_step_0: bool = False,
    recompute: bool = False,
) -> dict[str, Tensor]:
    """The six losses over the inner steps 1..K, unweighted.

    * final: cross-entropy at step K on all targets.
    * masked: mean cross-entropy at steps 1..K-1 on editable targets (deep supervision), and at
      step 0 where the base trains (`trains_step_0`).
    * halt: binary cross-entropy of p_commit at steps 1..K-1 with "the next step does not lower the
      chunk's mean cross-entropy by more than `halt_margin`".
    * len: cross-entropy of the length head at step K with the length of the correct leading run.
    * ponder: expected number of inner steps when each step t < K stops with p_commit_t; in 1..K.
    * stability: KL(step t-1 || step t) on committed targets, the earlier step without gradient.

    Where positions stop on their own, each target stops at step t with the head's probability,
    and at K with what is left. Final is then the expected cross-entropy (`halting: expected`), or
    that of the target's expected probability (`marginal`). It supervises every step: masked is
    that of step 0 alone, and halt and len are 0.

    With K = 1 there is no earlier step to train, and masked, halt and stability are 0 unless the
    base trains. With K = 0 the loss is the base's own, and the others are 0. With `recompute` the
    activations of an inner step live only while it runs: its backward runs it again, and gives the
    same gradients.
    """
    config, boundary = wrapper.config, wrapper.boundary
    num_steps = config.max_inner_steps
    if not num_steps:
        (ce,) = _in_slices(chunk.logits, draft.targets, None)
        others = dict.fromkeys(("masked", "halt", "len", "ponder", "stability"), ce.new_zeros(()))
        return {"final": _counted_mean(ce, draft), **others}
    keep_from = None if config.backprop_steps is None else num_steps - config.backprop_steps + 1
    inputs, counted, run = draft.inputs, draft.counted, _again if recompute else _once
    masked, stability, chunk_ce, commit_logits, stopped = [], [], [], [], []
    ce = chunk.logits.new_empty(0)  # of the last of the K >= 1 steps
    if trains_step_0:
        if chunk.logits.numel() > SLICE:
            (ce,) = _in_slices(chunk.logits, draft.targets, None)
        else:
            logits = chunk.logits.float().transpose(1, 2)
            ce = F.cross_entropy(logits, draft.targets, reduction="none")
        masked.append(_mean(ce, draft.among(draft.editable), draft.num_editable))
    for t in range(1, num_steps + 1):
        if t == keep_from:
            chunk = _detached(chunk)
        chunk, (ce, *change) = run(_refine, wrapper, chunk, inputs, draft.targets)
        if change:
            committed = draft.among(~draft.editable)
            stability.append(_mean(change[0], committed, draft.num_committed))
        if chunk.halting is not None:
            stopped.append((chunk.halting, ce))
            continue
        chunk_ce.append(_row_means(ce.detach(), counted))
        if t < num_steps:
            assert boundary is not None, "no position stops on its own"
            masked.append(_mean(ce, draft.among(draft.editable), draft.num_editable))
            commit_logits.append(boundary.scores(chunk.h_top.detach())[0])
            if config.commit == "learned":
                inputs = edit(inputs, chunk.logits.argmax(-1), draft.editable)
    halt = length = zero = ce.new_zeros(())
    ponder = zero + 1
    if stopped:
        ce, num_taken = _expected(stopped)
        if config.halting == "marginal":
            ce = _marginal(stopped)
        ponder = _counted_mean(num_taken, draft)
    elif boundary is not None:
        _, log_length = boundary.scores(chunk.h_top.detach())
        correct = draft.among(chunk.logits.argmax(-1) == draft.targets)
        run = correct.long().cumprod(1).sum(1).clamp(max=config.max_chunk_len)
        length = F.nll_loss(log_length, run)
    if commit_logits:
        logits = torch.stack(commit_logits)  # [K-1, B]
        losses_by_step = torch.stack(chunk_ce)  # [K, B]
        done = (losses_by_step[:-1] - losses_by_step[1:] <= config.halt_margin).float()
        halt = F.binary_cross_entropy_with_logits(logits, done)
        still_running = torch.sigmoid(-logits).cumprod(0)  # after each of the steps 1..K-1
        ponder = (1 + still_running.sum(0)).mean()
    return {
        "final": _counted_mean(ce, draft),
        "masked": torch.stack(masked).mean() if masked else zero,
        "halt": halt,
        "len": length,
        "ponder": ponder,
        "stability": torch.stack(stability).mean() if stability else zero,
    }


def _expected(steps: list[tuple[Halting, Tensor]]) -> tuple[Tensor, Tensor]:
    """Of steps 1..K with their cross-entropies [B, W]: the expected cross-entropy, and the expected
    number of inner steps, each [B, W]; what has not stopped before does so at step K."""
    expected = num_taken = torch.zeros_like(steps[0][1])
    running = torch.ones_like(expected)
    for halting, ce in steps[:-1]:
        num_taken = num_taken + running
        expected = expected + (running - halting.running) * ce
        running = halting.running
    return expected + running * steps[-1][1], num_taken + running


def _marginal(steps: list[tuple[Halting, Tensor]]) -> Tensor:
    """Of steps 1..K with their cross-entropies [B, W]: -log of the target's expected probability,
    [B, W]. A step at which the target is improbable weighs less in its gradient."""
    log_running, log_joint = torch.zeros_like(steps[0][1]), []
    for halting, ce in steps[:-1]:
        log_joint.append(log_running + F.logsigmoid(halting.logit) - ce)
        log_running = log_running + F.logsigmoid(-halting.logit)
    log_joint.append(log_running - steps[-1][1])
    return -torch.stack(log_joint).logsumexp(0)


def _counted_mean(values: Tensor, draft: Draft) -> Tensor:
    """The mean over the slots that count."""
    if draft.counted is None:
        return values.mean()
    return _mean(values, draft.counted, draft.num_counted)


def _row_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of each row [B] over its masked values; None stands for all values."""
    if mask is None:
        return values.mean(1)
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def _detached(chunk: ChunkState) -> ChunkState:
    states = {i: s.detach() for i, s in chunk.states.items()}
    return replace(chunk, h_top=chunk.h_top.detach(), logits=chunk.logits.detach(), states=states)
