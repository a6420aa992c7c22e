"""Positions that stop on their own (`halting: expected` or `marginal`).

As PonderNet (Banino et al., 2021): `HaltingHead` reads the top hidden states of steps 0, 1, ... and
gives the probability p_t of stopping at inner step t >= 1 when no earlier step did, so a position
stops at step t with probability p_t * prod_{s<t} (1 - p_s). Training weighs the losses of the steps
with it (`training.objective`). Elsewhere a position stops at the first step where the sum of these
probabilities reaches `commit_threshold`, at the latest after the last step. That depends on no
later position, so the likelihood of a text is a true one. The states of a position that has stopped
go on: later positions read them at every step that they take themselves.

Shapes: B batch, W positions, D hidden size, G width of the head's memory, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_recursive.model.cells import HaltingHead


@dataclass
class Halting:
    """Which positions have stopped, after an inner step t >= 1.

    Attributes:
        memory: Of the head, for the next step [B, W, G].
        logit: Of p_t [B, W].
        running: Probability of not having stopped yet [B, W], float32.
        stopped: bool [B, W]: has stopped, at this step or before.
        output: Logits of each position at the step where it stopped, of this step where it has not
            [B, W, V].
    """

    memory: Tensor
    logit: Tensor
    running: Tensor
    stopped: Tensor
    output: Tensor


def next_halting(
    head: HaltingHead,
    threshold: float,
    before: Halting | None,
    h_before: Tensor,
    h_top: Tensor,
    logits: Tensor,
) -> Halting:
    """After one more inner step. The head reads top hidden states without their gradients.

    Args:
        threshold: Probability of having stopped at which a position stops.
        before: After the step before; None at the first.
        h_before: Top hidden state of the step before [B, W, D].
        h_top, logits: Of the step [B, W, D] and [B, W, V].
    """
    earlier = head(h_before.detach(), None)[1] if before is None else before.memory
    logit, memory = head(h_top.detach(), earlier)
    running = torch.sigmoid(-logit)
    if before is None:
        return Halting(memory, logit, running, running <= 1 - threshold, logits)
    running = before.running * running
    output = torch.where(before.stopped[..., None], before.output, logits)
    return Halting(memory, logit, running, running <= 1 - threshold, output)
