"""`RecursiveConfig`: every parameter of the recursive refinement loop, validated in one place."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kimi_recursive.files import read_json_object
from kimi_recursive.text import shown, unknown_key_message

CONFIG_NAME = "recursive_config.json"
CORRUPTION_SCHEDULES = ("linear", "cosine", "none")
COMMIT_MODES = ("verified", "learned")
HALTING_MODES = ("threshold", "expected", "marginal")


@dataclass
class RecursiveConfig:
    """Parameters of the recursive refinement loop.

    The defaults are those of the 48B model; the embedded default of the workflow overrides the
    sizes (`recursive:` in `config/config.yaml`). Construction accepts any value: `validate()` lists
    all errors, and `ChunkRefineWrapper` refuses an invalid config.

    Attributes:
        recursive_enabled: Master switch. When False no component is created.
        chunk_width: W, tokens per chunk.
        max_inner_steps: K, refinement steps per chunk; 0 leaves the base alone.
        halting: What the head that stops is trained for. `threshold`: to foresee that a further
            step does not help; `commit="learned"` stops a chunk there. With the others every token
            stops on its own, in evaluation and in generation, and `commit` must be `verified`.
            `expected`: the cross-entropy is that expected over the step at which a token stops,
            under the head's own probabilities (PonderNet, arXiv 2107.05407). `marginal`: that of
            the expected probability of the token, so steps at which it is improbable weigh less.
        commit_threshold: `commit="learned"` stops refining a chunk at this commit probability; with
            tokens that stop on their own, one stops once it has done so with this probability.
        min_commit_threshold: After K steps, commit the predicted length at or above this
            probability; below it commit one token, so that generation never deadlocks.
        single_pass: Control arm: the cells act as adapters in one pass over the chunk, without
            feedback from an earlier step and without a state; needs `max_inner_steps` 1.
        commit: How drafted tokens are committed, `verified` (exact) or `learned` (boundary head).
        layers_to_refine: `"all"` or a list of decoder layer indices, each with one `RefineCell`.
        use_latent_token: Feed the top hidden state of one step into the embeddings of the next.
        use_token_feedback: Let each position read the model's own prediction of the step before in
            place of its token, as far as a trained gate opens.
        feedback_top_k: How many of the most probable tokens that prediction averages.
        d_state: Width of the state that each cell carries over the inner steps.
        gate_hidden: Hidden width of the boundary head.
        max_chunk_len: Longest length the boundary head can predict; at least `chunk_width`.
        corruption_rate: Share of the editable draft tokens corrupted at the start of training.
        corruption_rate_final: The same at the end of training.
        corruption_schedule: `linear`, `cosine` or `none` (constant `corruption_rate`).
        backprop_steps: Number of last inner steps that gradients flow through; None means all K.
        halt_margin: A further step is worth taking when it lowers the chunk's mean loss by more
            than this (nats per token); the target of the halt loss.
        lambda_final: Weight of the cross-entropy on all chunk targets: at step K, or that of
            `halting`.
        lambda_masked: Weight of the cross-entropy at steps 1..K-1 on editable targets.
        lambda_halt: Weight of the binary cross-entropy of the commit probability.
        lambda_len: Weight of the cross-entropy of the length head.
        lambda_ponder: Weight of the expected number of steps under the halting distribution.
        lambda_stability: Weight of the change of prediction between steps on committed targets.
    """

    recursive_enabled: bool = False
    chunk_width: int = 128
    max_inner_steps: int = 4
    halting: str = "threshold"
    commit_threshold: float = 0.7
    min_commit_threshold: float = 0.3
    single_pass: bool = False
    commit: str = "verified"
    layers_to_refine: str | list[int] = "all"
    use_latent_token: bool = True
    use_token_feedback: bool = False
    feedback_top_k: int = 8
    d_state: int = 512
    gate_hidden: int = 1024
    max_chunk_len: int = 128
    corruption_rate: float = 0.3
    corruption_schedule: str = "linear"
    corruption_rate_final: float = 0.1
    backprop_steps: int | None = None
    halt_margin: float = 0.005
    lambda_final: float = 1.0
    lambda_masked: float = 0.5
    lambda_halt: float = 0.5
    lambda_len: float = 0.05
    lambda_ponder: float = 0.01
    lambda_stability: float = 0.01

    @property
    def stops_by_token(self) -> bool:
        """Whether every token stops on its own."""
        return self.halting != "threshold"

    def validate(self) -> list[str]:
        """All errors as one line each; an empty list when the config is valid."""
        errors: list[str] = []

        def check(name: str, ok: bool, allowed: str) -> bool:
            if not ok:
                errors.append(f"{name} must be {allowed}, got {shown(getattr(self, name))}")
            return ok

        def is_int(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool)

        def is_number(value: Any) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool)

        switches = ("recursive_enabled", "use_latent_token", "use_token_feedback", "single_pass")
        for name in switches:
            check(name, isinstance(getattr(self, name), bool), "true or false")
        counts = (
            "chunk_width", "d_state", "gate_hidden", "max_chunk_len", "feedback_top_k",
        )  # fmt: skip
        counts_ok = [
            check(name, is_int(v := getattr(self, name)) and v >= 1, "an integer of at least 1")
            for name in counts
        ]
        depth = self.max_inner_steps
        check("max_inner_steps", is_int(depth) and depth >= 0, "an integer of at least 0")
        rates = ("commit_threshold", "min_commit_threshold", "corruption_rate")
        for name in (*rates, "corruption_rate_final"):
            value = getattr(self, name)
            check(name, is_number(value) and 0.0 <= value <= 1.0, "a number from 0 to 1")
        weights = [f.name for f in dataclasses.fields(self) if f.name.startswith("lambda_")]
        for name in (*weights, "halt_margin"):
            value = getattr(self, name)
            ok = is_number(value) and math.isfinite(value) and value >= 0
            check(name, ok, "a finite number of at least 0")
        for name, choices in (
            ("corruption_schedule", CORRUPTION_SCHEDULES),
            ("commit", COMMIT_MODES),
            ("halting", HALTING_MODES),
        ):
            check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        steps = self.backprop_steps
        check(
            "backprop_steps",
            steps is None or (is_int(steps) and steps >= 1),
            "null (all steps) or an integer of at least 1",
        )
        layers = self.layers_to_refine
        check(
            "layers_to_refine",
            layers == "all"
            or (
                isinstance(layers, list)
                and len(layers) > 0
                and all(is_int(i) and i >= 0 for i in layers)
                and len(set(layers)) == len(layers)
            ),
            "'all' or a non-empty list of distinct layer indices of at least 0",
        )
        if all(counts_ok) and self.max_chunk_len < self.chunk_width:
            errors.append(
                f"max_chunk_len must be at least chunk_width ({self.chunk_width}), "
                f"got {self.max_chunk_len}"
            )
        if self.single_pass is True and self.max_inner_steps != 1:
            errors.append(f"max_inner_steps must be 1 with single_pass, got {self.max_inner_steps}")
        if self.stops_by_token and self.commit == "learned":
            errors.append(f"commit must be verified with halting '{self.halting}', got 'learned'")
        low, high = self.min_commit_threshold, self.commit_threshold
        if is_number(low) and is_number(high) and low > high:
            errors.append(
                f"min_commit_threshold must be at most commit_threshold ({high}), got {low}"
            )
        return errors

    def validated(self, where: str = "RecursiveConfig") -> RecursiveConfig:
        """This config, if it is valid.

        Raises:
            ValueError: it is not; the message names `where` and every error.
        """
        if errors := self.validate():
            raise ValueError(f"{where}: {'; '.join(errors)}")
        return self

    def layer_indices(self, num_layers: int) -> list[int]:
        """The decoder layers that get a cell, ascending.

        Raises:
            ValueError: an index is not a layer of a base with `num_layers` layers.
        """
        if isinstance(self.layers_to_refine, str):  # "all"
            return list(range(num_layers))
        outside = [i for i in self.layers_to_refine if i >= num_layers]
        if outside:
            raise ValueError(
                f"layers_to_refine: {outside} out of range; the base has {num_layers} layers, "
                f"allowed indices are 0 to {num_layers - 1}"
            )
        return sorted(self.layers_to_refine)

    def to_dict(self) -> dict[str, Any]:
        """All parameters as JSON types."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], where: str = "RecursiveConfig"
    ) -> RecursiveConfig:
        """Build from a mapping; keys that are left out take their defaults.

        Raises:
            ValueError: a key is unknown (all of them are named, each with the nearest valid key).
        """
        allowed = {f.name for f in dataclasses.fields(cls)}
        unknown = [unknown_key_message(k, allowed, where) for k in values if k not in allowed]
        if unknown:
            raise ValueError("; ".join(unknown))
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Write as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_file(cls, path: str | Path) -> RecursiveConfig:
        """Read from JSON. `validate` judges the values.

        Raises:
            ValueError: missing file, JSON that does not parse, unknown keys.
        """
        return cls.from_dict(read_json_object(path), where=str(path))


def get_baseline_config() -> RecursiveConfig:
    """Recursion disabled: the base model itself."""
    return RecursiveConfig(recursive_enabled=False)


def get_after_surgery_config() -> RecursiveConfig:
    """Recursion enabled with untrained cells; must equal the baseline."""
    return RecursiveConfig(recursive_enabled=True)


def get_phase_a_config() -> RecursiveConfig:
    """Phase A: the sidecar trains, the base is frozen."""
    return RecursiveConfig(recursive_enabled=True)


def get_phase_b_config() -> RecursiveConfig:
    """Phase B: LoRA on the top layers joins; drafts are closer to the model's own by then."""
    return RecursiveConfig(recursive_enabled=True, corruption_rate=0.2, corruption_rate_final=0.1)


def get_phase_c_config() -> RecursiveConfig:
    """Phase C: a subset of layers unfreezes; the lightest corruption."""
    return RecursiveConfig(recursive_enabled=True, corruption_rate=0.1, corruption_rate_final=0.05)
