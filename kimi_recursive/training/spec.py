"""What one training of a phase is given, beside the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.published import Published
from kimi_recursive.training.arms import ARMS, PHASES
from kimi_recursive.training.settings import NUM_KEPT, PhaseSettings
from kimi_recursive.training.tracking import DEFAULT


@dataclass(frozen=True)
class PhaseSpec:
    """What is trained, and how.

    Attributes:
        phase: `a`, `b` or `c`.
        seed: Of data order, chunk positions, corruption, and what is new in the model.
        arm: One of `ARMS`.
        overrides: Parameters of `RecursiveConfig` to change in the config.
        config: Takes the place of the parent's config.

    Raises:
        ValueError: unknown phase or arm.
    """

    phase: str
    settings: PhaseSettings
    seed: int
    arm: str = "recursive"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    config: RecursiveConfig | None = None

    def __post_init__(self) -> None:
        if self.phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, got {self.phase!r}")
        if self.arm not in ARMS:
            raise ValueError(f"arm must be one of {', '.join(ARMS)}, got {self.arm!r}")


@dataclass(frozen=True)
class RunFiles:
    """What a training reads and writes.

    Attributes:
        parent: The model that training starts from: a sidecar directory of the phase before or of
            the same phase; for phase a also a base (a directory or a Hub id).
        tokens: Folder with the tokens of each split.
        sidecar: Becomes a sidecar directory, with the weights that were best on validation.
        logs: Parquet, one row a step (columns: README of `results/`).
        summary: JSON: parameters, tokens, FLOPs, best step, validation loss by inner step.
        work: The experiment directory (`training.experiment`), with the checkpoints.
        published: Keeps sidecar, logs and summary, so that a run of the same fingerprint is not
            trained again; None keeps nothing.
    """

    parent: str | Path
    tokens: Path
    sidecar: Path
    logs: Path
    summary: Path
    work: Path
    published: Path | None = None

    def keeper(self, fingerprint: Mapping[str, Any]) -> Published | None:
        """What keeps the outputs of a run of this fingerprint."""
        outputs = (self.sidecar, self.logs, self.summary)
        return self.published and Published(self.published, outputs, fingerprint)


@dataclass(frozen=True)
class LoadOptions:
    """How the base is loaded; see `load_base`."""

    dtype: str = "auto"
    revision: str | None = None
    trust_remote_code: bool = False
    device_map: Any = None

    def keywords(self) -> dict[str, Any]:
        """Keyword arguments of `load_model_with_config`."""
        return dataclasses.asdict(self)

    def numeric(self) -> dict[str, Any]:
        """The options that decide numbers."""
        return {k: v for k, v in self.keywords().items() if k != "device_map"}


@dataclass(frozen=True)
class Record:
    """What the experiment directory says and keeps.

    Attributes:
        name: Of the experiment; by default the name of its folder.
        description: What is tested, in words.
        inputs: Further paths to record, by name.
        tokens_stay: Whether the folder of tokens will still be there, so that its path is worth
            recording.
        num_kept: Checkpoints to keep beside the best; None for all.
        tracking: Where metrics are also shown, of `training.tracking.TRACKERS`.
        refuse_others: Raise when the directory holds another computation, instead of starting
            afresh.
    """

    name: str | None = None
    description: str | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)
    tokens_stay: bool = True
    num_kept: int | None = NUM_KEPT
    tracking: Sequence[str] = DEFAULT
    refuse_others: bool = False

    def paths(self, tokens: Path, **more: Any) -> dict[str, Any]:
        """The paths that the experiment directory records."""
        return {**more, **({"tokens": tokens} if self.tokens_stay else {}), **self.inputs}
