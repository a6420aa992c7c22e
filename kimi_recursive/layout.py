"""Where every file of `results/` lies. No other module, rule or script spells such a name.

Names may hold Snakemake's wildcards: `Layout().run("{key}").sidecar`. `results/README.md` says what
each file is; a test compares the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

RESULTS_SUFFIX = "_results.json"


@dataclass(frozen=True)
class TextFolder:
    """The corpus or its tokens, by split, with the facts about them as JSON."""

    folder: Path

    def split(self, split: str) -> Path:
        """`split` is `train`, `validation` or `test`."""
        return self.folder / f"{split}.parquet"

    @property
    def facts(self) -> Path:
        return self.folder / f"{self.folder.name}.json"


@dataclass(frozen=True)
class WorkFolder:
    """The experiment directory of a training, from which an interrupted one resumes."""

    folder: Path

    @property
    def metadata(self) -> Path:
        return self.folder / "experiment_metadata.json"

    @property
    def config(self) -> Path:
        return self.folder / "recursive_config.json"

    @property
    def fingerprint(self) -> Path:
        return self.folder / "fingerprint.json"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    @property
    def best_checkpoint(self) -> Path:
        return self.folder / "checkpoints/best"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics"

    @property
    def logs(self) -> Path:
        return self.folder / "logs"

    @property
    def notes(self) -> Path:
        return self.folder / "notes"

    def checkpoint(self, step: int | str) -> Path:
        name = step if isinstance(step, str) else f"{step:06d}"
        return self.folder / f"checkpoints/step_{name}"


@dataclass(frozen=True)
class BaseFolder:
    """The base model and, of one from scratch, its training."""

    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def logs(self) -> Path:
        return self.folder / "train_logs.parquet"

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.folder / "work")


@dataclass(frozen=True)
class RunFolder:
    """The training of a phase."""

    folder: Path

    @property
    def sidecar(self) -> Path:
        return self.folder / "sidecar"

    @property
    def logs(self) -> Path:
        return self.folder / "train_logs.parquet"

    @property
    def summary(self) -> Path:
        return self.folder / "train_summary.json"

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.folder / "work")


@dataclass(frozen=True)
class EvaluationFiles:
    """What one evaluation writes into a folder."""

    folder: Path
    name: str

    @property
    def results(self) -> Path:
        return self.folder / f"{self.name}{RESULTS_SUFFIX}"

    @property
    def documents(self) -> Path:
        return self.folder / f"{self.name}_documents.parquet"

    @classmethod
    def all_in(cls, folder: Path) -> list[EvaluationFiles]:
        """The evaluations in a folder, by name."""
        paths = sorted(folder.glob(f"*{RESULTS_SUFFIX}"))
        return [cls(folder, path.name.removesuffix(RESULTS_SUFFIX)) for path in paths]


@dataclass(frozen=True)
class StudentFolder:
    """The training of a student of Track-B."""

    folder: Path

    @property
    def logs(self) -> Path:
        return self.folder / "logs/train_logs.parquet"

    @property
    def log_lines(self) -> Path:
        return self.folder / "logs/train_logs.jsonl"

    @property
    def summary(self) -> Path:
        return self.folder / "logs/train_summary.json"

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints/student_best.safetensors"

    @property
    def scores(self) -> Path:
        return self.folder / "evaluation.parquet"

    @property
    def work(self) -> WorkFolder:
        return WorkFolder(self.folder / "work")

    def checkpoint(self, step: int | str) -> Path:
        return self.folder / f"checkpoints/student_step_{step}.safetensors"


@dataclass(frozen=True)
class TrackBSummary:
    """What Track-B's summary writes."""

    folder: Path

    @property
    def table(self) -> Path:
        return self.folder / "summary.csv"

    @property
    def text(self) -> Path:
        return self.folder / "summary.txt"

    @property
    def comparison(self) -> Path:
        return self.folder / "comparison.csv"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def figure(self) -> Path:
        return self.folder / "recall_by_step.png"


@dataclass(frozen=True)
class TrackBFolder:
    """Track-B: the teacher's vectors, the students, and what they are compared with."""

    folder: Path

    @property
    def sentences(self) -> Path:
        return self.folder / "sentences.parquet"

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def teacher_facts(self) -> Path:
        return self.teacher / "teacher.json"

    @property
    def teacher_vectors(self) -> Path:
        return self.teacher / "vectors.npy"

    @property
    def teacher_work(self) -> Path:
        return self.folder / "teacher_work"

    @property
    def neighbours(self) -> Path:
        return self.folder / "neighbours.npz"

    @property
    def sanity(self) -> Path:
        return self.folder / "sanity.json"

    @property
    def references(self) -> Path:
        return self.folder / "references.parquet"

    @property
    def students(self) -> Path:
        return self.folder / "students"

    @property
    def summary(self) -> TrackBSummary:
        return TrackBSummary(self.folder)

    def student(self, key: str) -> StudentFolder:
        return StudentFolder(self.students / key)


@dataclass(frozen=True)
class Layout:
    """The results folder of one matrix.

    Attributes:
        root: By default `results`, in the folder that Snakemake runs in.
    """

    root: Path = Path("results")

    @property
    def corpus(self) -> TextFolder:
        return TextFolder(self.root / "corpus")

    @property
    def tokens(self) -> TextFolder:
        return TextFolder(self.root / "tokens")

    @property
    def tokenizer(self) -> Path:
        return self.root / "tokenizer"

    @property
    def base(self) -> BaseFolder:
        return BaseFolder(self.root / "base")

    @property
    def repeat(self) -> Path:
        return self.root / "compare/repeat.json"

    @property
    def table(self) -> Path:
        return self.root / "summary.csv"

    @property
    def text(self) -> Path:
        return self.root / "summary.txt"

    @property
    def verdicts(self) -> Path:
        return self.root / "verdicts.json"

    @property
    def perplexity_by_step(self) -> Path:
        return self.root / "figures/perplexity_by_step.png"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def track_b(self) -> TrackBFolder:
        return TrackBFolder(self.root / "track_b")

    @property
    def track_b_quick(self) -> Path:
        return self.root / "track_b_quick"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def surgery(self, seed: int | str) -> Path:
        return self.root / f"surgery/s{seed}"

    def run(self, key: str) -> RunFolder:
        return RunFolder(self.root / "runs" / key)

    def evaluation(self, name: str) -> EvaluationFiles:
        return EvaluationFiles(self.root / "eval", name)

    def proof(self, proof: str) -> Path:
        """`proof` is `zero_init`, with `_s<seed>` behind it for every seed but the first."""
        return self.root / f"compare/{proof}.json"

    def log(self, rule: str, wildcard: str | None = None) -> Path:
        """The log of a job; `wildcard` is what tells the jobs of one rule apart."""
        return self.logs / (f"{rule}.log" if wildcard is None else f"{rule}/{wildcard}.log")

    def logs_of(self, rule: str) -> list[Path]:
        """The logs that exist of a rule with a wildcard."""
        return self._found(f"logs/{rule}/*.log")

    def evaluations(self) -> list[EvaluationFiles]:
        """The evaluations that exist, by name."""
        return EvaluationFiles.all_in(self.root / "eval")

    def works(self) -> list[WorkFolder]:
        """The experiment directories that exist: of the base, the phases, and the students."""
        found = self._found("base/work", "runs/*/work", "track_b/students/*/work")
        return [WorkFolder(path) for path in found]

    def read_by_summary(self) -> list[Path]:
        """The files that exist and that the summary reads."""
        return self._found("eval/*.*", "compare/*.*", "runs/*/*.*", "logs/*/*.log")

    def read_by_track_b(self) -> list[Path]:
        """The files that exist and that Track-B's summary reads."""
        return self._found("track_b/students/*/logs/*", "logs/train_student/*.log")

    def read_by_report(self) -> list[Path]:
        """The files that exist and that the report reads."""
        patterns = ("runs/*/work/metrics", "track_b/references.parquet", "logs/**/*.log")
        more = ("base/train_logs.parquet", "track_b/students/*/*.parquet")
        return [*self.read_by_summary(), *self.read_by_track_b(), *self._found(*patterns, *more)]

    def _found(self, *patterns: str) -> list[Path]:
        return [path for pattern in patterns for path in sorted(self.root.glob(pattern))]

    def track_b_summary(self, quick: bool) -> TrackBSummary:
        """Where Track-B's summary goes; `quick` is `track_b.quick` of the config."""
        return TrackBSummary(self.track_b_quick) if quick else self.track_b.summary

    @classmethod
    def of_work(cls, work: Path) -> Layout | None:
        """The results folder that the experiment directory of a phase lies in, or None."""
        run = work.resolve().parent
        inside = work.resolve() == RunFolder(run).work.folder and run.parent.name == "runs"
        return cls(run.parents[1]) if inside else None
