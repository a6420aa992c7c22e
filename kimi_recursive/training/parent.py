"""The model that a phase starts from."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.model.sidecar import Sidecar, base_of
from kimi_recursive.training.arms import ARMS, kind_of
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
    def open(
        cls, path: str | Path, phase: str, arm: str = "recursive", revision: str | None = None
    ) -> Parent:
        """Read what the model says of itself, as the parent of a training of `phase`.

        Args:
            revision: Of the base; by default the one that the sidecar names.

        Raises:
            ValueError: the arm has no such phase, the model is of another phase than this one and
                the one before, its base is missing, or its sidecar is damaged.
        """
        if phase not in ARMS[arm].phases:
            raise ValueError(
                f"arm '{arm}' trains in the phases {', '.join(ARMS[arm].phases)} alone: phase "
                f"{phase} trains the cells, and it has none"
            )
        sidecar = Sidecar.find(path)
        trained = sidecar and sidecar.phase
        before = ARMS[arm].before(phase)
        if trained not in (before, phase):
            is_what = f"is of phase {trained}" if trained else "is not trained"
            needs = f"a model of phase {before}" if before else "a base or untrained cells"
            of_arm = "" if arm == "recursive" else f" of the arm '{arm}'"
            raise ValueError(f"phase {phase}{of_arm} starts from {needs}; {path} {is_what}")
        return cls(
            path, sidecar, base_of(sidecar or path), revision or (sidecar and sidecar.revision)
        )

    @property
    def phase(self) -> str | None:
        """The phase that it was trained in last; None before training."""
        return self.sidecar and self.sidecar.phase

    def configs(self, spec: PhaseSpec) -> tuple[RecursiveConfig, RecursiveConfig]:
        """The config of the recursive arm, whose FLOPs an arm of equal FLOPs is given, and that of
        the arm to train.

        Raises:
            ValueError: the parent is of another kind of arm, or the depth of the recursive arm is
                unknown and its FLOPs count.
        """
        arm = ARMS[spec.arm]
        if self.sidecar is not None and self.phase is not None:
            kind = kind_of(self.sidecar.config())
            if kind != arm.kind:
                raise ValueError(
                    f"{self.path}: was trained as an arm of kind {kind} and cannot continue as arm "
                    f"'{spec.arm}'"
                )
        config = spec.config or RecursiveConfig.from_file(Path(self.path) / CONFIG_NAME)
        values = {**config.to_dict(), **spec.overrides}
        depth_is_known = kind_of(config) == "recursive" or "max_inner_steps" in spec.overrides
        if arm.equal_flops and not depth_is_known:
            raise ValueError(
                f"{self.path}: does not name the number of inner steps of the recursive arm, whose "
                f"FLOPs arm '{spec.arm}' needs; set max_inner_steps in a config"
            )
        reference = RecursiveConfig.from_dict({**values, "single_pass": False})
        return reference, dataclasses.replace(reference, **arm.parameters)
