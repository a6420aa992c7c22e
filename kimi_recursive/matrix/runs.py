"""The run sheet: which trainings and evaluations the config asks for, and their names.

A training is keyed by what it computes (arm, phase, seed, variant); two evaluations that need the
same training share it. The DAG and the summary both take their runs from here, so they expect the
same runs. The variant "" is the config itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from kimi_recursive.matrix.settings import MODEL_KEYS, Config
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
        variant: The variant that it is trained for.
    """

    arm: str
    phase: str
    seed: int
    parent: str | None
    repeat: bool = False
    variant: str = ""

    @property
    def key(self) -> str:
        repeat = "_repeat" if self.repeat else ""
        return f"{self.arm}_{self.phase}_s{self.seed}{repeat}{behind(self.variant)}"

    @property
    def stage(self) -> str:
        """`finetuned_<arm>`, with `_<phase>` behind it from phase b on, and then `-<variant>`."""
        phase = "" if self.phase == "a" else f"_{self.phase}"
        return f"finetuned_{self.arm}{phase}{behind(self.variant)}"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation.

    Attributes:
        name: The stage, with `_s<seed>` in it for every seed but the first of the list.
        stage: `baseline`, `after_surgery`, or that of the training.
        seed: Of the cells and the training; None for the baseline.
        training: Key of the training evaluated, None before training.
        variant: That of the training.
    """

    name: str
    stage: str
    seed: int | None
    training: str | None
    variant: str = ""


@dataclass(frozen=True)
class Surgery:
    """Untrained cells.

    Attributes:
        proof: The name of their zero-init proof.
        variant: The first one that has such cells.
    """

    seed: int
    proof: str
    variant: str = ""

    @property
    def name(self) -> str:
        """`s<seed>`, with `-<variant>` behind it."""
        return f"s{self.seed}{behind(self.variant)}"

    @property
    def label(self) -> str:
        """What it is called in sentences."""
        return f"{self.seed} of {self.variant}" if self.variant else str(self.seed)


def behind(variant: str) -> str:
    """What a variant adds to a name. No arm, phase or stage has a `-` in its own."""
    return f"-{variant}" if variant else ""


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


def trainings(config: Config, variant: str = "") -> list[Training]:
    """The training runs of the config itself or of a variant, parents first, without the repeat.
    Runs that a variant shares with the config, or with a variant before it, are not its own."""
    runs = []
    for phase in config.phases:
        for name, arm in ARMS.items():
            if config.origins.get((variant, name, phase)) != variant:
                continue
            before = arm.before(phase)
            for seed in config.seeds:
                parent = None
                if before:
                    of = config.origins[variant, name, before]
                    parent = Training(name, before, seed, None, variant=of).key
                runs.append(Training(name, phase, seed, parent, variant=variant))
    return runs


def _variant_trainings(config: Config) -> list[Training]:
    return [run for variant in config.variants for run in trainings(config, variant)]


def settings_of(config: Config, run: Training) -> PhaseSettings:
    """The settings of a training."""
    return config.variant(run.variant).phase_settings(run.arm, run.phase)


def repeated(config: Config) -> Training | None:
    """The run that is trained a second time: the first recursive one. None when not asked for."""
    return replace(trainings(config)[0], repeat=True) if config.repeat else None


def all_trainings(config: Config) -> dict[str, Training]:
    """Every training by key, the repeat and those of variants among them."""
    repeat = repeated(config)
    own = [*trainings(config), *([repeat] if repeat else [])]
    return {run.key: run for run in [*own, *_variant_trainings(config)]}


def chain(config: Config, key: str | None) -> list[Training]:
    """A training, and before it those that it starts from; empty for None."""
    runs, found = all_trainings(config), []
    while key:
        found.insert(0, runs[key])
        key = runs[key].parent
    return found


def evaluations(config: Config) -> list[Evaluation]:
    """The evaluations of the config itself, in the order of the summary, without the repeat."""
    rows = [Evaluation("baseline", "baseline", None, None)]
    for seed in config.seeds:
        rows.append(Evaluation(f"after_surgery{_of(config, seed)}", "after_surgery", seed, None))
    return rows + [_evaluation(config, run) for run in trainings(config)]


def variant_evaluations(config: Config) -> list[Evaluation]:
    """The evaluations of the variants. Their untrained cells are evaluated in the proof alone."""
    return [_evaluation(config, run) for run in _variant_trainings(config)]


def _evaluation(config: Config, run: Training) -> Evaluation:
    stage, seed = replace(run, variant="").stage, _of(config, run.seed)
    return Evaluation(
        f"{stage}{seed}{behind(run.variant)}", run.stage, run.seed, run.key, run.variant
    )


def _of(config: Config, seed: int) -> str:
    return "" if seed == config.seeds[0] else f"_s{seed}"


def repeated_evaluation(config: Config) -> Evaluation | None:
    """The evaluation of the repeated run."""
    run = repeated(config)
    return run and Evaluation(f"{run.stage}_repeat", run.stage, run.seed, run.key)


def all_evaluations(config: Config) -> dict[str, Evaluation]:
    """Every evaluation by name, the repeat's and those of variants among them."""
    repeat = repeated_evaluation(config)
    own = [*evaluations(config), *([repeat] if repeat else [])]
    return {run.name: run for run in [*own, *variant_evaluations(config)]}


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


def surgery_of(config: Config, seed: int, variant: str = "") -> Surgery:
    """The untrained cells of a seed's runs."""
    mine = config.variant(variant).recursive_part(MODEL_KEYS)
    names = ("", *config.variants)
    first = next(v for v in names if config.variant(v).recursive_part(MODEL_KEYS) == mine)
    return Surgery(seed, f"zero_init{_of(config, seed)}{behind(first)}", first)


def surgeries(config: Config) -> list[Surgery]:
    """All untrained cells of the matrix."""
    every = [surgery_of(config, s, v) for v in ("", *config.variants) for s in config.seeds]
    return list(dict.fromkeys(every))


def training_labels(run: Training) -> dict[str, str]:
    """What Snakemake's own report calls a training."""
    arm = run.arm + " (repeat)" * run.repeat + (f" ({run.variant})" if run.variant else "")
    return {"arm": arm, "phase": run.phase, "seed": str(run.seed)}


def evaluation_labels(config: Config, run: Evaluation) -> dict[str, str]:
    """What Snakemake's own report calls an evaluation."""
    if run.training:
        labels = training_labels(all_trainings(config)[run.training])
        return {"stage": labels.pop("arm"), **labels}
    return {"stage": run.stage, "phase": "-", "seed": "-" if run.seed is None else str(run.seed)}
