"""The model that a phase starts from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.model.sidecar import Sidecar, base_of
from kimi_recursive.training.arms import ARMS, PHASES
from kimi_recursive.training.spec import PhaseSpec


@dataclass(frozen=True)
class Parent:
    """A base, untrained cells, or a trained model.

    Attributes:
        sidecar: Its sidecar, open; None for a base.
        base: Its base, a directory or a Hub id.
        revision: The revision of that base.
    """

    path: str | Path
    sidecar: Sidecar | None
    base: str
    revision: str | None

    @classmethod
    def open(cls, path: str | Path, phase: str, revision: str | None = None) -> Parent:
        """Read what the model says of itself, as the parent of a training of `phase`.

        Args:
            revision: Of the base; by default the one that the sidecar names.

        Raises:
            ValueError: the model is of another phase than this one and the one before, its base is
                missing, or its sidecar is damaged.
        """
        sidecar = Sidecar.find(path)
        trained = sidecar and sidecar.phase
        before = PHASES[PHASES.index(phase) - 1] if phase != PHASES[0] else None
        if trained not in (before, phase):
            is_what = f"is of phase {trained}" if trained else "is not trained"
            needs = f"a model of phase {before}" if before else "a base or untrained cells"
            raise ValueError(f"phase {phase} starts from {needs}; {path} {is_what}")
        return cls(
            path, sidecar, base_of(sidecar or path), revision or (sidecar and sidecar.revision)
        )

    @property
    def phase(self) -> str | None:
        """The phase that it was trained in last; None before training."""
        return self.sidecar and self.sidecar.phase

    def configs(self, spec: PhaseSpec) -> tuple[RecursiveConfig, RecursiveConfig]:
        """The config of the recursive arm, whose FLOPs `vanilla_flops` is given, and that of the
        arm to train.

        Raises:
            ValueError: the parent is of another kind of arm, or the depth of the recursive arm is
                unknown and its FLOPs count.
        """
        if self.sidecar is not None and self.phase is not None:
            single_pass = self.sidecar.config().single_pass
            if single_pass != bool(ARMS[spec.arm].get("single_pass")):
                kind = "a single-pass" if single_pass else "the recursive"
                raise ValueError(
                    f"{self.path}: was trained as {kind} arm and cannot continue as arm "
                    f"'{spec.arm}'"
                )
        config = spec.config or RecursiveConfig.from_file(Path(self.path) / CONFIG_NAME)
        reference = RecursiveConfig.from_dict({**config.to_dict(), **spec.overrides})
        if spec.arm == "vanilla_flops" and reference.single_pass and reference.max_inner_steps == 1:
            raise ValueError(
                f"{self.path}: does not name the number of inner steps of the recursive arm, whose "
                "FLOPs arm 'vanilla_flops' needs; set max_inner_steps in a config"
            )
        reference = dataclasses.replace(reference, single_pass=False)
        return reference, dataclasses.replace(reference, **ARMS[spec.arm])
