"""The tasks of the matrix: what each model scores, and whether the loop does better by sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kimi_recursive.evaluation.bootstrap import CONFIDENCE
from kimi_recursive.evaluation.outcomes import Statistic, compare_samples
from kimi_recursive.files import file_digest
from kimi_recursive.layout import SIDECAR_NAME, Layout
from kimi_recursive.matrix import expected
from kimi_recursive.matrix.artefacts import model_of
from kimi_recursive.matrix.comparison import DIFFERENCE, TaskComparison, how_compared
from kimi_recursive.matrix.runs import Evaluation, TaskRun, task_runs
from kimi_recursive.matrix.settings import Config
from kimi_recursive.processes.logs import logged_error
from kimi_recursive.report.comparisons import Pair, pairs_of
from kimi_recursive.report.summary import Matrix, read_record
from kimi_recursive.status import Status
from kimi_recursive.tables import NAME, NUMBER, TEXT, Column, Table, interval, percent

QUESTION = "Does recursion help with the tasks?"
KEYS = ("step", "sidecar_sha256", "config", "tasks", "upstream", "scores")
LEAST_SAMPLES = 20  # below, an interval of resamples is too narrow to judge by
OTHER_MODEL = "Answers exist, but of another model than the one that is there now."


@dataclass(frozen=True)
class Score:
    """What a model scores in one metric of a task, at an inner step.

    Attributes:
        last: The inner step that the model was trained with.
        metric: With the filter of the answers behind it, where there is one.
        value, stderr: None where they are not finite, or the harness has no standard error.
        higher_is_better: None where the task does not say.
        statistic: None where a sample has no outcome of its own.
    """

    evaluation: Evaluation
    step: int
    last: int
    task: str
    metric: str
    value: float | None
    stderr: float | None
    num_samples: int
    higher_is_better: bool | None
    statistic: Statistic | None

    @classmethod
    def from_json(cls, run: TaskRun, last: int, entry: Mapping[str, Any]) -> Score:
        """From an entry of `scores` of `<name>_step_<t>.json`.

        Raises:
            TypeError: the entry lacks a key.
        """
        statistic = entry.get("statistic")
        found = {**entry, "statistic": statistic and Statistic(statistic)}
        return cls(run.evaluation, run.step, last, **found)

    @property
    def text(self) -> str:
        if self.value is None:
            return "not finite"
        value = f"{self.value:.4f}" if abs(self.value) < 1e4 else f"{self.value:.3e}"
        return value if self.stderr is None else f"{value} ± {self.stderr:.4f}"


@dataclass(frozen=True)
class Tasks:
    """What exists of the tasks.

    Attributes:
        absent: Where the answers are missing or damaged: the status, and what is known.
    """

    scores: list[Score]
    comparisons: list[TaskComparison]
    absent: list[tuple[TaskRun, Status, str]]

    @property
    def problems(self) -> list[tuple[str, Status, str]]:
        """Rows of `problem_table`."""
        return [
            (f"{run.evaluation.name}, tasks at inner step {run.step}", status, detail)
            for run, status, detail in self.absent
        ]

    def cells(self, name: str) -> dict[str, float | None]:
        """Columns of `summary.csv` for an evaluation: `<task>.<metric>` at its last inner step,
        with `_step_<t>` behind it at another one, and each with `_stderr` behind that."""
        found: dict[str, float | None] = {}
        for score in self.scores:
            if score.evaluation.name == name:
                at = "" if score.step == score.last else f"_step_{score.step}"
                key = f"{score.task}.{score.metric}{at}"
                found |= {key: score.value, f"{key}_stderr": score.stderr}
        return found


def read_tasks(config: Config, layout: Layout, matrix: Matrix) -> Tasks:
    """Read whatever exists of the tasks that the config asks for."""
    scores: dict[tuple[str, int], list[Score]] = {}
    absent = []
    for run in task_runs(config):
        found, status, detail = _read(config, layout, matrix, run)
        if status == Status.OK:
            scores[run.evaluation.name, run.step] = found
        else:
            absent.append((run, status, detail))
    comparisons = []
    for pair in pairs_of(matrix.rows):
        sides = [(row["name"], pair.arm_step) for row in pair.mine]
        others = [(row["name"], pair.reference_step) for row in pair.others]
        if all(side in scores for side in (*sides, *others)):
            for score in scores[sides[0]]:
                comparisons.append(_compare(layout, pair, score))
    return Tasks([s for found in scores.values() for s in found], comparisons, absent)


def _read(
    config: Config, layout: Layout, matrix: Matrix, run: TaskRun
) -> tuple[list[Score], Status, str]:
    name = run.evaluation.name
    row = next(row for row in matrix.rows if row["name"] == name)
    found, problem = read_record(layout.tasks(name, run.step).results, KEYS)
    if found is None:
        problem = (
            problem or logged_error(layout.log("evaluate_tasks", f"{name}_step_{run.step}"))[0]
        )
        return [], Status.FAILED if problem else Status.MISSING, problem
    if others := expected.differing(expected.for_tasks(config, run.evaluation), found):
        return [], Status.MISSING, expected.made_with_others(others)
    if row["status"] != Status.OK:
        return [], Status.MISSING, row["detail"] or "Its evaluation is not there."
    sidecar = model_of(config, run.evaluation, layout) / SIDECAR_NAME
    if found["sidecar_sha256"] != (file_digest(sidecar) if sidecar.is_file() else None):
        return [], Status.MISSING, OTHER_MODEL
    try:
        scores = [Score.from_json(run, row["inner_steps"], entry) for entry in found["scores"]]
    except (TypeError, ValueError) as error:
        return [], Status.FAILED, f"{layout.tasks(name, run.step).results}: is damaged ({error})"
    return scores, Status.OK, ""


def _compare(layout: Layout, pair: Pair, score: Score) -> TaskComparison:
    what: dict[str, Any] = {"task": score.task, "metric": score.metric}
    higher, problem = bool(score.higher_is_better), ""
    if score.statistic is None:
        problem = "a sample has no outcome of its own, so arms cannot be compared sample by sample."
    elif score.higher_is_better is None and score.statistic is Statistic.MEAN:
        problem = "the task does not say whether higher is better (higher_is_better in its YAML)."
    elif score.num_samples < LEAST_SAMPLES:
        problem = (
            f"{score.num_samples} samples are too few for a verdict, {LEAST_SAMPLES} is the least."
        )
    if problem or score.statistic is None:
        return TaskComparison(*pair.what, problem=problem, **what)
    try:
        found = compare_samples(
            [layout.tasks(row["name"], pair.arm_step).samples for row in pair.mine],
            [layout.tasks(row["name"], pair.reference_step).samples for row in pair.others],
            score.task,
            score.metric,
            score.statistic.sign(higher),
        )
    except ValueError as error:
        return TaskComparison(*pair.what, problem=str(error), **what)
    return TaskComparison(
        *pair.what, found, **what, statistic=score.statistic, higher_is_better=higher
    )


def task_sentence(tasks: Tasks) -> str:
    """The answer to `QUESTION`: how many comparisons say what."""
    verdicts = [pair.verdict for pair in tasks.comparisons if pair.difference]
    if not verdicts:
        return (
            "Not known: no trained recursive arm has answered them, or nothing to compare it with."
        )
    helps, hurts = verdicts.count("helps"), verdicts.count("hurts")
    return (
        f"Of {len(verdicts)} comparisons {helps} help{'s' * (helps == 1)}, {hurts} "
        f"hurt{'s' * (hurts == 1)}, {len(verdicts) - helps - hurts} cannot be told from 0. Where "
        f"nothing differs, about {(1 - CONFIDENCE) * len(verdicts):.1f} would seem to."
    )


def task_tables(tasks: Tasks) -> Iterator[Table]:
    """For each task its scores, then for each metric the comparisons."""
    for task in dict.fromkeys(score.task for score in tasks.scores):
        yield _score_table(task, [score for score in tasks.scores if score.task == task])
        found = [pair for pair in tasks.comparisons if pair.task == task]
        for metric in dict.fromkeys(pair.metric for pair in found):
            yield _comparison_table(task, metric, [pair for pair in found if pair.metric == metric])


def _score_table(task: str, scores: list[Score]) -> Table:
    metrics = list(dict.fromkeys(score.metric for score in scores))
    rows: dict[tuple[str, int], list[Any]] = {}
    for score in scores:
        step = f"{score.step}{'*' * (score.step > score.last)}"
        name = score.evaluation.name
        row = rows.setdefault((name, score.step), [name, step, *[None] * len(metrics)])
        row[2 + metrics.index(score.metric)] = score.text
    columns = [Column("evaluation", NAME), Column("inner step"), *_numbers(metrics)]
    most = max(score.num_samples for score in scores)
    notes = [f"Value ± standard error over the {most} samples."]
    notes += ["*: beyond the trained depth."] if any(s.step > s.last for s in scores) else []
    return Table(f"Task {task}", columns, list(rows.values()), notes)


def _numbers(headings: list[str]) -> list[Column]:
    return [Column(heading, NUMBER) for heading in headings]


def _comparison_table(task: str, metric: str, comparisons: list[TaskComparison]) -> Table:
    rows = [
        [pair.arm, pair.reference, ", ".join(map(str, pair.seeds)), *_change_cells(pair)]
        for pair in comparisons
    ]
    columns = [Column("arm", NAME), Column("against", NAME), Column("seeds", TEXT), *DIFFERENCE]
    notes = list(dict.fromkeys(f"{metric}: {c.problem}" for c in comparisons if c.problem))
    compared = [pair for pair in comparisons if pair.difference]
    if compared:
        better = "Higher" if compared[0].higher_is_better else "Lower"
        notes.append(f"{better} is better. {how_compared(compared, 'samples')}")
    return Table(f"Task {task}, {metric}: the loop against its references", columns, rows, notes)


def _change_cells(pair: TaskComparison) -> list[str | None]:
    """Cells of the columns `DIFFERENCE`."""
    if pair.difference is None:
        return [None] * 3
    mean, low, high = pair.change
    if pair.statistic is Statistic.PERPLEXITY:
        return [percent(mean), interval(low, high), pair.verdict]
    return [f"{mean:+.4f}", f"[{low:+.4f}, {high:+.4f}]", pair.verdict]
