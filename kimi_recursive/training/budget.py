"""Training FLOPs of an objective, so that arms can be given the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.integrations import moe  # noqa: F401, registers torch.ops.transformers

from kimi_recursive.evaluation.flops import count_flops
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.model.loading import build_wrapper
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.processes import distributed
from kimi_recursive.training.arms import ARMS
from kimi_recursive.training.batches import Batch
from kimi_recursive.training.objective import DraftRepair, build_objective
from kimi_recursive.training.spec import PhaseSpec

# FLOPs of a pass over one window: by what decides them, the start of its chunk, and whether its
# draft is the gold text.
_counted: dict[tuple[Any, ...], int] = {}


def _what_decides(objective: DraftRepair, batch: Batch) -> tuple[Any, ...]:
    """All that decides the FLOPs of a pass over one window, but for where its chunk starts: layers
    and which weights train, what the configs say of the way through them, and the window's length,
    which may cut the chunk of a pair."""
    wrapper = objective.wrapper
    base = wrapper.base.config
    weights = [(p.shape, p.dtype, p.device.type, p.requires_grad) for p in objective.parameters()]
    config = {**base.to_dict(), "_name_or_path": None}
    ways = (base._attn_implementation, base._experts_implementation, objective.recompute)
    window = (batch.inputs.shape[1], batch.mask is not None)
    return (repr(objective), *weights, repr(config), repr(wrapper.config), *ways, *window)


def cumulative_training_flops(objective: DraftRepair, batch: Batch, num_steps: int) -> list[int]:
    """FLOPs after each of `num_steps` optimizer steps, forward and backward.

    Steps differ only in the length of the prefix before their chunk and in whether the draft is
    the gold text; each kind is run and counted once in a process, on one window, since every
    counted product is as large as the batch.

    Args:
        batch: This process's share of a batch as in training.
    """
    decides = _what_decides(objective, batch)
    total, cumulative = 0, []
    for step in range(num_steps):
        drawn = objective.draw(batch, step)
        kind = (*decides, drawn.start, drawn.clean)
        if kind not in _counted:
            _counted[kind] = count_flops(
                lambda s=step: objective(batch.first_row(), s)[0].backward()
            )
        total += _counted[kind] * len(batch) * distributed.num_processes()
        cumulative.append(total)
    objective.zero_grad(set_to_none=True)
    return cumulative


def steps_for_flops(cumulative: list[int], budget: int) -> int:
    """Optimizer steps whose FLOPs are nearest to `budget`; `cumulative` must reach it."""
    assert cumulative[-1] >= budget, "count more steps"
    return 1 + min(range(len(cumulative)), key=lambda i: abs(cumulative[i] - budget))


@dataclass(frozen=True)
class Budget:
    """Optimizer steps of a run, and their FLOPs."""

    num_steps: int
    flops: int


def match_flops(
    spec: PhaseSpec, wrapper: ChunkRefineWrapper, reference: RecursiveConfig, batch: Batch
) -> Budget:
    """The steps that an arm takes: those of the settings, or in an arm of equal FLOPs as many as
    come nearest to the FLOPs of the recursive arm.

    Args:
        reference: The config of the recursive arm.
        batch: This process's share of a batch.
    """
    settings, num_steps = spec.settings, spec.settings.num_steps

    def flops(model: ChunkRefineWrapper, scheduled: int, counted: int) -> list[int]:
        objective = build_objective(model, scheduled, settings, spec.seed)
        objective.recompute = False  # what is computed twice to save memory is no training
        return cumulative_training_flops(objective, batch, counted)

    if ARMS[spec.arm].equal_flops:
        recursive = build_wrapper(wrapper.base, reference)
        recursive.adapter = wrapper.adapter
        budget = flops(recursive, num_steps, num_steps)[-1]
        # One pass of this arm costs at least half of one of the recursive arm's, cells included.
        most = 2 * num_steps * (2 + reference.max_inner_steps)
        num_steps = steps_for_flops(flops(wrapper, num_steps, most), budget)
    return Budget(num_steps, flops(wrapper, num_steps, num_steps)[-1])
