"""The phases and arms of training, and what makes each arm what it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kimi_recursive.model.config import RecursiveConfig

PHASES = ("a", "b", "c")
MAX_SEED = 2**31 - 1


@dataclass(frozen=True)
class Arm:
    """One way to train the same base on the same text.

    Attributes:
        kind: `recursive`, `single_pass` (the same cells in one pass) or `vanilla` (no cells).
        what: The arm in a few words.
        parameters: Of `RecursiveConfig`, what makes the arm what it is.
        phases: Those that it has something to train in.
        equal_flops: Trained for the FLOPs of the recursive arm, not for its steps.
        unread: Keys of `recursive` and `training.<phase>` that decide nothing of this arm; whoever
            differs in these alone has the same control.
    """

    kind: str
    what: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    phases: tuple[str, ...] = PHASES
    equal_flops: bool = False
    unread: frozenset[str] = frozenset()

    def before(self, phase: str) -> str | None:
        """The phase that a phase of this arm starts from; None for untrained cells."""
        at = self.phases.index(phase)
        return self.phases[at - 1] if at else None


_SINGLE_PASS = {"single_pass": True, "max_inner_steps": 1}
_VANILLA = {"max_inner_steps": 0, "corruption_rate": 0.0, "corruption_rate_final": 0.0}
# What is between inner steps: a single pass has nothing of it. Token feedback would only move the
# draw of its boundary head, which is not in the logits.
_NOT_IN_A_PASS = frozenset((
    "max_inner_steps", "use_token_feedback", "feedback_top_k", "backprop_steps", "halt_margin",
    "commit", "lambda_masked", "lambda_halt", "lambda_ponder", "lambda_stability", "lr_feedback",
    "feedback_only_steps",
))  # fmt: skip
_NOT_IN_THE_BASE = _NOT_IN_A_PASS | {
    "layers_to_refine", "use_latent_token", "d_state", "gate_hidden", "max_chunk_len",
    "corruption_rate", "corruption_rate_final", "corruption_schedule", "own_draft_share",
    "scheduled_sampling", "lambda_len", "lr", "lr_heads",
}  # fmt: skip
# What decides the FLOPs of the loop, and with them the steps of an arm of equal FLOPs.
_COST = frozenset((
    "max_inner_steps", "use_token_feedback", "feedback_top_k", "backprop_steps",
    "layers_to_refine", "use_latent_token", "d_state", "gate_hidden", "max_chunk_len",
    "corruption_rate", "corruption_rate_final", "corruption_schedule", "scheduled_sampling",
))  # fmt: skip

ARMS: dict[str, Arm] = {
    "recursive": Arm("recursive", "the loop"),
    "single_pass": Arm(
        "single_pass",
        "the same cells in a single pass, at equal tokens",
        _SINGLE_PASS,
        unread=_NOT_IN_A_PASS,
    ),
    "single_pass_flops": Arm(
        "single_pass",
        "the same cells in a single pass, at equal FLOPs",
        _SINGLE_PASS,
        equal_flops=True,
        unread=_NOT_IN_A_PASS - _COST,
    ),
    "vanilla": Arm(
        "vanilla",
        "the base fine-tuned without cells, at equal tokens",
        _VANILLA,
        PHASES[1:],
        unread=_NOT_IN_THE_BASE,
    ),
    "vanilla_flops": Arm(
        "vanilla",
        "the base fine-tuned without cells, at equal FLOPs",
        _VANILLA,
        PHASES[1:],
        equal_flops=True,
        unread=_NOT_IN_THE_BASE - _COST,
    ),
}


def kind_of(config: RecursiveConfig) -> str:
    """The kind of arm that a model with this config is of."""
    if not config.max_inner_steps:
        return "vanilla"
    return "single_pass" if config.single_pass else "recursive"
