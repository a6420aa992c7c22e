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
    """

    kind: str
    what: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    phases: tuple[str, ...] = PHASES
    equal_flops: bool = False

    def before(self, phase: str) -> str | None:
        """The phase that a phase of this arm starts from; None for untrained cells."""
        at = self.phases.index(phase)
        return self.phases[at - 1] if at else None


_SINGLE_PASS = {"single_pass": True, "max_inner_steps": 1}
_VANILLA = {"max_inner_steps": 0, "corruption_rate": 0.0, "corruption_rate_final": 0.0}

ARMS: dict[str, Arm] = {
    "recursive": Arm("recursive", "the loop"),
    "single_pass": Arm(
        "single_pass", "the same cells in a single pass, at equal tokens", _SINGLE_PASS
    ),
    "single_pass_flops": Arm(
        "single_pass",
        "the same cells in a single pass, at equal FLOPs",
        _SINGLE_PASS,
        equal_flops=True,
    ),
    "vanilla": Arm(
        "vanilla", "the base fine-tuned without cells, at equal tokens", _VANILLA, PHASES[1:]
    ),
    "vanilla_flops": Arm(
        "vanilla", "the base fine-tuned without cells, at equal FLOPs", _VANILLA, PHASES[1:], True
    ),
}


def kind_of(config: RecursiveConfig) -> str:
    """The kind of arm that a model with this config is of."""
    if not config.max_inner_steps:
        return "vanilla"
    return "single_pass" if config.single_pass else "recursive"
