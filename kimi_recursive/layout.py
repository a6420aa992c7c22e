"""Where every file of `results/` lies. No other module, rule or script spells such a name.

Names may hold Snakemake's wildcards: `Layout().run("{key}").sidecar`. `results/README.md` says what
each file is; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

RESULTS_SUFFIX = "_results.json"
SIDECAR_NAME = "sidecar.safetensors"  # in a sidecar's folder
T = TypeVar("T")


@dataclass(frozen=True)
class Folder:
    """A folder; its parts are attributes."""

    folder: Path


class Part(Generic[T]):
    """A part of a folder: the path `name` in it, as what `make` makes of a path."""

    def __init__(self, name: str, make: Callable[[Path], T]):
        self.name, self.make = name, make

    def __get__(self, owner: Folder, _owner_type: type[Folder] | None = None) -> T:
        return self.make(owner.folder / self.name)


def _at(name: str) -> Part[Path]:
    return Part(name, Path)


class TextFolder(Folder):
    """The corpus or its tokens, by split, with the facts about them as JSON."""

    def split(self, split: str) -> Path:
        """`split` is `train`, `validation` or `test`, or `pretrain` where the corpus has it."""
        return self.folder / f"{split}.parquet"

    @property
    def facts(self) -> Path:
        return self.folder / f"{self.folder.name}.json"


class WorkFolder(Folder):
    """The experiment directory of a training, from which an interrupted one resumes."""

    metadata = _at("experiment_metadata.json")
    config = _at("recursive_config.json")
    fingerprint = _at("fingerprint.json")
    lock = _at("lock")
    best_checkpoint = _at("checkpoints/best")
    metrics = _at("metrics")
    logs = _at("logs")
    notes = _at("notes")

    def checkpoint(self, step: int | str) -> Path:
        name = step if isinstance(step, str) else f"{step:06d}"
        return self.folder / f"checkpoints/step_{name}"


class BaseFolder(Folder):
    """The base model and, of one from scratch, its training."""

    model = _at("model")
    logs = _at("train_logs.parquet")
    published = _at("published")
    work = Part("work", WorkFolder)


class RunFolder(Folder):
    """The training of a phase."""

    sidecar = _at("sidecar")
    logs = _at("train_logs.parquet")
    summary = _at("train_summary.json")
    published = _at("published")
    work = Part("work", WorkFolder)


@dataclass(frozen=True)
class EvaluationFiles(Folder):
    """What one evaluation writes into a folder."""

    name: str

    @property
    def results(self) -> Path:
        return self.folder / f"{self.name}{RESULTS_SUFFIX}"

    @property
    def documents(self) -> Path:
        return self.folder / f"{self.name}_documents.parquet"

    @property
    def published(self) -> Path:
        return self.folder / "published" / self.name

    @classmethod
    def all_in(cls, folder: Path) -> list[EvaluationFiles]:
        """The evaluations in a folder, by name."""
        paths = sorted(folder.glob(f"*{RESULTS_SUFFIX}"))
        return [cls(folder, path.name.removesuffix(RESULTS_SUFFIX)) for path in paths]


@dataclass(frozen=True)
class TaskFiles(Folder):
    """What one model's answers to the tasks, at one inner step, are written into."""

    name: str

    @property
    def results(self) -> Path:
        return self.folder / f"{self.name}.json"

    @property
    def samples(self) -> Path:
        return self.folder / f"{self.name}_samples.parquet"

    @property
    def published(self) -> Path:
        return self.folder / "published" / self.name


class StudentFolder(Folder):
    """The training of a student of Track-B."""

    logs = _at("logs/train_logs.parquet")
    log_lines = _at("logs/train_logs.jsonl")
    summary = _at("logs/train_summary.json")
    best = _at("checkpoints/student_best.safetensors")
    scores = _at("evaluation.parquet")
    published = _at("published")
    work = Part("work", WorkFolder)

    @property
    def outputs(self) -> tuple[Path, Path, Path]:
        """The files that the workflow waits for."""
        return self.logs, self.best, self.scores

    def checkpoint(self, step: int | str) -> Path:
        return self.folder / f"checkpoints/student_step_{step}.safetensors"


class TrackBSummary(Folder):
    """What Track-B's summary writes."""

    table = _at("summary.csv")
    text = _at("summary.txt")
    comparison = _at("comparison.csv")
    pairs = _at("pairs.csv")
    runs = _at("runs")
    figure = _at("recall_by_step.png")


class TrackBFolder(Folder):
    """Track-B: the teacher's vectors, the students, and what they are compared with."""

    sentences = _at("sentences.parquet")
    teacher = _at("teacher")
    teacher_facts = _at("teacher/teacher.json")
    teacher_vectors = _at("teacher/vectors.npy")
    teacher_work = _at("teacher_work")
    neighbours = _at("neighbours.npz")
    sanity = _at("sanity.json")
    references = _at("references.parquet")
    students = _at("students")

    @property
    def summary(self) -> TrackBSummary:
        return TrackBSummary(self.folder)

    def student(self, key: str) -> StudentFolder:
        return StudentFolder(self.students / key)


@dataclass(frozen=True)
class Layout(Folder):
    """The results folder of one matrix.

    Attributes:
        folder: By default `results`, in the folder that Snakemake runs in.
    """

    folder: Path = Path("results")

    task = _at("task")
    corpus = Part("corpus", TextFolder)
    tokens = Part("tokens", TextFolder)
    tokenizer = _at("tokenizer")
    base = Part("base", BaseFolder)
    repeat = _at("compare/repeat.json")
    table = _at("summary.csv")
    text = _at("summary.txt")
    verdicts = _at("verdicts.json")
    perplexity_by_step = _at("figures/perplexity_by_step.png")
    report = _at("report.html")
    track_b = Part("track_b", TrackBFolder)
    track_b_quick = _at("track_b_quick")
    composition = _at("composition")
    composition_table = _at("composition.csv")
    composition_answer = _at("composition.json")
    composition_figure = _at("figures/composition.png")
    logs = _at("logs")

    def surgery(self, cells: str) -> Path:
        """`cells` is `s<seed>`, with `-<variant>` behind it where a variant has others."""
        return self.folder / f"surgery/{cells}"

    def run(self, key: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / key)

    def evaluation(self, name: str) -> EvaluationFiles:
        return EvaluationFiles(self.folder / "eval", name)

    def tasks(self, name: str, step: int | str) -> TaskFiles:
        """Of an evaluation, at an inner step."""
        return TaskFiles(self.folder / "eval/tasks", f"{name}_step_{step}")

    def proof(self, proof: str) -> Path:
        """`proof` is `zero_init`, with `_s<seed>` behind it for every seed but the first, and
        `-<variant>` where a variant has cells of its own."""
        return self.folder / f"compare/{proof}.json"

    def log(self, rule: str, wildcard: str | None = None) -> Path:
        """The log of a job; `wildcard` is what tells the jobs of one rule apart."""
        return self.logs / (f"{rule}.log" if wildcard is None else f"{rule}/{wildcard}.log")

    def logs_of(self, rule: str) -> list[Path]:
        """The logs that exist of a rule with a wildcard."""
        return self._found(f"logs/{rule}/*.log")

    def evaluations(self) -> list[EvaluationFiles]:
        """The evaluations that exist, by name."""
        return EvaluationFiles.all_in(self.folder / "eval")

    def works(self) -> list[WorkFolder]:
        """The experiment directories that exist: of the base, the phases, and the students."""
        found = self._found("base/work", "runs/*/work", "track_b/students/*/work")
        return [WorkFolder(path) for path in found]

    def read_by_summary(self) -> list[Path]:
        """The files that exist and that the summary reads."""
        return self._found(
            "eval/*.*", "eval/tasks/*.*", "compare/*.*", "runs/*/*.*", "logs/*/*.log",
            "composition.json",
        )  # fmt: skip

    def read_by_track_b(self) -> list[Path]:
        """The files that exist and that Track-B's summary reads."""
        return self._found("track_b/students/*/logs/*", "logs/train_student/*.log")

    def read_by_report(self) -> list[Path]:
        """The files that exist and that the report reads."""
        patterns = ("runs/*/work/metrics", "track_b/references.parquet", "logs/**/*.log")
        more = ("base/train_logs.parquet", "track_b/students/*/*.parquet")
        return [*self.read_by_summary(), *self.read_by_track_b(), *self._found(*patterns, *more)]

    def _found(self, *patterns: str) -> list[Path]:
        return [path for pattern in patterns for path in sorted(self.folder.glob(pattern))]

    def track_b_summary(self, quick: bool) -> TrackBSummary:
        """Where Track-B's summary goes; `quick` is `track_b.quick` of the config."""
        return TrackBSummary(self.track_b_quick) if quick else self.track_b.summary

    @classmethod
    def of_work(cls, work: Path) -> Layout | None:
        """The results folder that the experiment directory of a phase lies in, or None."""
        run = work.resolve().parent
        inside = work.resolve() == RunFolder(run).work.folder and run.parent.name == "runs"
        return cls(run.parents[1]) if inside else None
