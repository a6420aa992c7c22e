"""Drafts: gold text of a chunk with some of its tokens replaced, as generation would meet it.

A chunk of W inputs has W targets: slot j (0..W-1) is the token that input position j predicts, and
slot j is also input j + 1. As in generation, the first `c` slots are committed and the rest, the
draft, is editable.

Shapes: B batch, W chunk width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_recursive.data.windows import IGNORED
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.processes import distributed
from kimi_recursive.training.batches import Batch


def corruption_rate_at(config: RecursiveConfig, progress: float) -> float:
    """Share of editable inputs to corrupt when `progress` (0..1) of training is done."""
    first, last = config.corruption_rate, config.corruption_rate_final
    if config.corruption_schedule == "linear":
        return first + (last - first) * progress
    if config.corruption_schedule == "cosine":
        return last + (first - last) * 0.5 * (1 + math.cos(math.pi * progress))
    return first


@dataclass
class Draft:
    """A corrupted chunk.

    Attributes:
        inputs: [B, W]. The committed ones are gold, some of the others are corrupted.
        targets: [B, W], gold; where a slot does not count, any token.
        editable: bool [B, W], by slot.
        counted: bool [B, W], the slots that count, which lead each row; None when all do.
        num_counted, num_editable, num_committed: How many of the slots that count there are in the
            whole batch, and how many of these are editable or not, for each of the equal parts
            that it was cut into; at least one in all. Scalars.
    """

    inputs: Tensor
    targets: Tensor
    editable: Tensor
    counted: Tensor | None
    num_counted: Tensor
    num_editable: Tensor
    num_committed: Tensor

    def among(self, slots: Tensor) -> Tensor:
        """Those of the slots that count."""
        return slots if self.counted is None else slots & self.counted


@dataclass
class Draw:
    """What is drawn for one optimizer step.

    Attributes:
        start: Where its chunk starts in the window.
        rate: Share of editable inputs to corrupt.
        sampling: Share of editable inputs to take from the model's own draft.
        generator: Decides which inputs those are.
    """

    start: int
    rate: float
    sampling: float
    generator: torch.Generator

    @property
    def clean(self) -> bool:
        """Whether the draft is the gold text."""
        return not (self.rate or self.sampling)


def corrupt(
    chunk: Batch,
    predicted: Tensor,
    drawn: Draw,
    own_share: float,
    vocab_size: int,
    part: tuple[int, int] = (0, 1),
) -> Draft:
    """Make a draft of gold text.

    Args:
        chunk: Of the rows that this process takes, or of one part of them.
        predicted: The base's own greedy prediction of each slot [B, W].
        drawn: How much is corrupted, or sampled from `predicted` (scheduled sampling in one
            parallel pass: Bengio et al., 2015; Mihaylova and Martins, 2019).
        own_share: Share of the replacements that are the base's prediction; the rest are random.
        part: Which part of how many.
    """
    inputs, device, generator = chunk.inputs.clone(), chunk.inputs.device, drawn.generator
    num_parts = distributed.num_processes() * part[1]
    width, batch = inputs.shape[1], len(inputs) * num_parts
    rows = distributed.share(batch, *part)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)[rows].to(device)

    # Of the whole batch. 0..W-1 are committed: at least one slot is editable.
    committed = (torch.rand(batch, 1, generator=generator) * width).long()
    editable = torch.arange(width, device=device) >= committed[rows].to(device)
    replace = (rand(batch, width) < drawn.rate) & editable
    own = rand(batch, width) < own_share
    noise = torch.randint(vocab_size, (batch, width), generator=generator)[rows]
    noise = noise.to(device)
    replacement = torch.where(own, predicted, noise)
    if drawn.sampling:
        sampled = (rand(batch, width) < drawn.sampling) & editable & ~replace
        replacement = torch.where(sampled, predicted, replacement)
        replace = replace | sampled
    inputs[:, 1:] = torch.where(replace[:, :-1], replacement[:, :-1], inputs[:, 1:])
    targets, counted, slots = chunk.targets, None, torch.full((batch, 1), width)
    if chunk.num_targets is not None:
        counted, slots = targets != IGNORED, chunk.num_targets[:, None]
        targets = targets.clamp(min=0)
    kept = torch.minimum(committed, slots)
    sums = (slots.sum(), (slots - kept).sum(), kept.sum())
    return Draft(inputs, targets, editable, counted, *(n.clamp(min=1) / num_parts for n in sums))


def edit(inputs: Tensor, predicted: Tensor, editable: Tensor) -> Tensor:
    """Inputs [B, W] with the editable ones replaced by the prediction of their slot."""
    edited = inputs.clone()
    edited[:, 1:] = torch.where(editable, predicted, edited.new_zeros(()))[:, :-1]
    return torch.where(F.pad(editable[:, :-1], (1, 0)), edited, inputs)
