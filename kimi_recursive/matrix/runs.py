"""The run sheet: which trainings and evaluations the config asks for, and where each one lives.

A training is keyed by what it computes (arm, phase, seed); two evaluations that need the same
training share it. Everything here is derived from the config, so that the DAG and the summary
expect the same runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from kimi_recursive.training.arms import ARMS, PHASES


@dataclass(frozen=True)
class Training:
    """One training run; `parent` is the key of the run it starts from, None for fresh cells.
    A `repeat` computes the same as the run without it, to see whether the numbers are the same."""

    arm: str
    phase: str
    seed: int
    parent: str | None
    repeat: bool = False

    @property
    def key(self) -> str:
        return f"{self.arm}_{self.phase}_s{self.seed}" + ("_repeat" if self.repeat else "")

    @property
    def stage(self) -> str:
        """`finetuned_<arm>`, with `_<phase>` behind it from phase b on."""
        return f"finetuned_{self.arm}" + ("" if self.phase == "a" else f"_{self.phase}")


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        name: File stem in `results/eval`; the stage, with `_s<seed>` behind it for every seed but
            the first of the list.
        stage: `baseline`, `after_surgery`, or that of the training.
        seed: Of the cells and the training; None for the baseline.
        training: Key of the training evaluated, None before training.
    """

    name: str
    stage: str
    seed: int | None
    training: str | None


TRAINED_STAGES = [Training(arm, phase, 0, None) for phase in PHASES for arm in ARMS]
STAGES = ("baseline", "after_surgery", *(training.stage for training in TRAINED_STAGES))


def trainings(config: Mapping[str, Any]) -> list[Training]:
    """All training runs of the matrix, parents first, without the repeat."""
    runs = []
    for phase in config["phases"]:
        for arm in ARMS:
            for seed in config["seeds"]:
                before = None
                if phase != PHASES[0]:
                    before = Training(arm, PHASES[PHASES.index(phase) - 1], seed, None).key
                runs.append(Training(arm, phase, seed, before))
    return runs


def repeated(config: Mapping[str, Any]) -> Training | None:
    """The run that is trained a second time: the first recursive one. None when not asked for."""
    return replace(trainings(config)[0], repeat=True) if config["repeat"] else None


def evaluations(config: Mapping[str, Any]) -> list[Evaluation]:
    """All evaluations of the matrix, in the order of the summary, without the repeat."""
    seeds = config["seeds"]

    def name(stage: str, seed: int) -> str:
        return stage if seed == seeds[0] else f"{stage}_s{seed}"

    rows = [Evaluation("baseline", "baseline", None, None)]
    rows += [Evaluation(name("after_surgery", s), "after_surgery", s, None) for s in seeds]
    rows += [Evaluation(name(t.stage, t.seed), t.stage, t.seed, t.key) for t in trainings(config)]
    return rows


def repeated_evaluation(config: Mapping[str, Any]) -> Evaluation | None:
    """The evaluation of the repeated run."""
    run = repeated(config)
    return run and Evaluation(f"{run.stage}_repeat", run.stage, run.seed, run.key)


def zero_init_name(config: Mapping[str, Any], seed: int) -> str:
    """File stem in `results/compare` of a seed's zero-init proof."""
    return "zero_init" if seed == config["seeds"][0] else f"zero_init_s{seed}"
