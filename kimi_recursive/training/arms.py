"""The phases and arms of training, and what makes each arm what it is."""

from __future__ import annotations

from typing import Any

PHASES = ("a", "b", "c")
MAX_SEED = 2**31 - 1


# Arms and the parameters of `RecursiveConfig` that make them what they are.
SINGLE_PASS = {"single_pass": True, "max_inner_steps": 1}
ARMS: dict[str, dict[str, Any]] = {
    "recursive": {"single_pass": False},
    "vanilla": SINGLE_PASS,  # the same cells, tokens and data order, in one pass
    "vanilla_flops": SINGLE_PASS,  # the same, trained for the FLOPs of the recursive arm
}
