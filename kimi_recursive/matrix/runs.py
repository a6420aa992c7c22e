"""The run sheet: which trainings and evaluations the config asks for, and their names.

A training is keyed by what it computes (arm, phase, seed); two evaluations that need the same
training share it. The DAG and the summary both take their runs from here, so they expect the same
runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kimi_recursive.matrix.settings import Config
from kimi_recursive.training.arms import ARMS, PHASES, kind_of
from kimi_recursive.training.settings import PhaseSettings

if TYPE_CHECKING:  # Snakemake and the command line start without torch.
    from kimi_recursive.model.sidecar import Sidecar


@dataclass(frozen=True)
class Training:
    """One training run.

    Attributes:
        parent: Key of the run that this one starts from; None for untrained cells.
        repeat: Whether this is the second training of a run, which shows whether both end in the
            same numbers.
    """

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
        name: The stage, with `_s<seed>` behind it for every seed but the first of the list.
        stage: `baseline`, `after_surgery`, or that of the training.
        seed: Of the cells and the training; None for the baseline.
        training: Key of the training evaluated, None before training.
    """

    name: str
    stage: str
    seed: int | None
    training: str | None


TRAINED_STAGES = [
    Training(arm, phase, 0, None) for phase in PHASES for arm in ARMS if phase in ARMS[arm].phases
]
# A model without cells that somebody has fine-tuned: a plain one, or a LoRA adapter.
PLAIN_STAGE = "finetuned_vanilla"
STAGES = ("baseline", "after_surgery", PLAIN_STAGE, *(run.stage for run in TRAINED_STAGES))


def stages_of(sidecar: Sidecar | None, recursive_enabled: bool = True) -> list[str]:
    """The stages that a model may be evaluated as, by its phase and its kind of arm.

    The two arms of a kind leave the same kind of sidecar. Untrained cells are the baseline, too.

    Args:
        sidecar: None for a model without one.
        recursive_enabled: Whether it is evaluated with its cells, or is its base alone.

    Raises:
        ValueError: its config is missing or damaged.
    """
    if sidecar is None:
        plain = ["baseline", PLAIN_STAGE]
        return [*plain, "after_surgery"] if recursive_enabled else plain
    if not recursive_enabled:
        return ["baseline"]
    if sidecar.phase is None:
        return ["after_surgery", "baseline"]
    kind = kind_of(sidecar.config())
    return [
        run.stage
        for run in TRAINED_STAGES
        if run.phase == sidecar.phase and ARMS[run.arm].kind == kind
    ]


def trainings(config: Config) -> list[Training]:
    """All training runs of the matrix, parents first, without the repeat."""
    runs = []
    for phase in config.phases:
        for name, arm in ARMS.items():
            if phase not in arm.phases:
                continue
            before = arm.before(phase)
            for seed in config.seeds:
                parent = before and Training(name, before, seed, None).key
                runs.append(Training(name, phase, seed, parent))
    return runs


def settings_of(config: Config, run: Training) -> PhaseSettings:
    """The settings of a training. An arm that starts in a later phase makes up for the steps of the
    phases before, so that the tokens of an arm are those of every other."""
    settings = config.training[run.phase]
    missed = PHASES[: PHASES.index(run.phase)] if run.phase == ARMS[run.arm].phases[0] else ()
    return replace(
        settings, num_steps=settings.num_steps + sum(config.training[p].num_steps for p in missed)
    )


def repeated(config: Config) -> Training | None:
    """The run that is trained a second time: the first recursive one. None when not asked for."""
    return replace(trainings(config)[0], repeat=True) if config.repeat else None


def all_trainings(config: Config) -> dict[str, Training]:
    """Every training by key, the repeat among them."""
    repeat = repeated(config)
    return {run.key: run for run in [*trainings(config), *([repeat] if repeat else [])]}


def chain(config: Config, key: str | None) -> list[Training]:
    """A training, and before it those that it starts from; empty for None."""
    runs, found = all_trainings(config), []
    while key:
        found.insert(0, runs[key])
        key = runs[key].parent
    return found


def evaluations(config: Config) -> list[Evaluation]:
    """All evaluations of the matrix, in the order of the summary, without the repeat."""

    def name(stage: str, seed: int) -> str:
        return stage if seed == config.seeds[0] else f"{stage}_s{seed}"

    rows = [Evaluation("baseline", "baseline", None, None)]
    rows += [Evaluation(name("after_surgery", s), "after_surgery", s, None) for s in config.seeds]
    rows += [Evaluation(name(t.stage, t.seed), t.stage, t.seed, t.key) for t in trainings(config)]
    return rows


def repeated_evaluation(config: Config) -> Evaluation | None:
    """The evaluation of the repeated run."""
    run = repeated(config)
    return run and Evaluation(f"{run.stage}_repeat", run.stage, run.seed, run.key)


def all_evaluations(config: Config) -> dict[str, Evaluation]:
    """Every evaluation by name, the repeat's among them."""
    repeat = repeated_evaluation(config)
    return {run.name: run for run in [*evaluations(config), *([repeat] if repeat else [])]}


@dataclass(frozen=True)
class TaskRun:
    """The tasks, asked of what an evaluation is of, at an inner step."""

    evaluation: Evaluation
    step: int


def task_runs(config: Config) -> list[TaskRun]:
    """Where the matrix asks its tasks: of every evaluation but those that another one answers for.

    Untrained cells, and step 0 where only cells were trained, are the baseline. An arm without the
    loop has one step.
    """
    asked = evaluations(config) if config.evaluation.tasks.names else []
    return [TaskRun(run, step) for run in asked for step in _task_steps(config, run)]


def _task_steps(config: Config, run: Evaluation) -> list[int]:
    if run.training is None:
        return [0] if run.stage == "baseline" else []
    training, steps = all_trainings(config)[run.training], config.evaluation.tasks.steps
    arm = ARMS[training.arm]
    last = arm.parameters.get("max_inner_steps", config.recursive.max_inner_steps)
    if arm.kind != "recursive":
        return [last]
    if steps is not None:
        return sorted(steps)
    return list(range(1 if training.phase == PHASES[0] else 0, last + 1))


def zero_init_name(config: Config, seed: int) -> str:
    """The name of a seed's zero-init proof."""
    return "zero_init" if seed == config.seeds[0] else f"zero_init_s{seed}"


def training_labels(run: Training) -> dict[str, str]:
    """What Snakemake's own report calls a training."""
    repeat = " (repeat)" if run.repeat else ""
    return {"arm": f"{run.arm}{repeat}", "phase": run.phase, "seed": str(run.seed)}


def evaluation_labels(config: Config, run: Evaluation) -> dict[str, str]:
    """What Snakemake's own report calls an evaluation."""
    if run.training:
        labels = training_labels(all_trainings(config)[run.training])
        return {"stage": labels.pop("arm"), **labels}
    return {"stage": run.stage, "phase": "-", "seed": "-" if run.seed is None else str(run.seed)}
