"""Train one student: one set of hyperparameters and one seed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from safetensors.torch import save_file
from torch import Tensor

from kimi_recursive.files import (
    NUMERICS_VERSION,
    file_digest,
    read_json_object,
    read_safetensors,
    versions,
    write_json,
    write_parquet,
)
from kimi_recursive.layout import StudentFolder
from kimi_recursive.processes.signals import stop_signals
from kimi_recursive.published import REPUBLISHED, Published
from kimi_recursive.track_b.evaluate import score_all
from kimi_recursive.track_b.metrics import NDCG, RECALL, score_vectors
from kimi_recursive.track_b.neighbours import Floats
from kimi_recursive.track_b.objectives import build_objective
from kimi_recursive.track_b.sheet import NEUTRAL, check_against_teacher, is_quick
from kimi_recursive.track_b.status import write_logs
from kimi_recursive.track_b.student import Student, build_student
from kimi_recursive.track_b.teacher import load_vectors
from kimi_recursive.track_b.truth import Truth, load_truth
from kimi_recursive.training.checkpoint import WorkDirectory
from kimi_recursive.training.experiment import ExperimentTracker, now
from kimi_recursive.training.loop import LoopResult, Task, train_loop
from kimi_recursive.training.settings import LoopSettings

STUDENT_NAME, QUEUE_NAME = "student.safetensors", "queue.safetensors"
MIN_LR_RATIO = 0.01
LOG_INTERVAL = 10


@stop_signals()
def train_student(
    settings: Mapping[str, Any],
    seed: int,
    teacher_dir: str | Path,
    neighbours_path: str | Path,
    run_dir: str | Path,
    name: str | None = None,
) -> dict[str, Any]:
    """Train a student in its run directory; an interrupted run resumes, and a finished one of the
    same settings and inputs is not trained again, with or without `work/`.

    If a batch does not fit in memory, it is halved, and the run resumes from its last checkpoint.

    Files: `logs/train_logs.parquet` and `.jsonl` (a row for each step), `logs/train_summary.json`,
    `checkpoints/student_best.safetensors` and `student_step_<N>.safetensors`, `evaluation.parquet`
    of the best student, and in `work/` the state that a rerun resumes from.

    Args:
        settings: A row of the sheet, without name and seeds.
        run_dir: Folder of this run alone.
        name: Name of the run in messages.

    Returns: the content of `train_summary.json`.

    Raises:
        ValueError: the settings do not fit the teacher, or the run diverged.
    """
    run_dir, name = Path(run_dir), name or Path(run_dir).name
    vectors, truth = load_vectors(teacher_dir), load_truth(neighbours_path)
    train = vectors["pool"]
    check_against_teacher(settings, train.shape[1], len(train))
    fingerprint = {
        "settings": {k: v for k, v in settings.items() if k not in NEUTRAL},
        "seed": seed,
        "vectors": file_digest(Path(teacher_dir) / "vectors.npy"),
        "neighbours": truth.digest(train, settings),
        "numerics": NUMERICS_VERSION,
    }
    files = StudentFolder(run_dir)
    outputs = (*files.outputs, files.summary, files.log_lines)
    published = Published(files.published, outputs, fingerprint)
    if published.fits():
        published.restore()
        print(f"{name}: {REPUBLISHED} {published.folder}", file=sys.stderr)
        return read_json_object(files.summary)
    paths = {"teacher": teacher_dir, "neighbours": neighbours_path}
    facts = {"seed": seed, "hyperparameters": dict(settings), "versions": versions()}
    queries = {split: len(rows) for split, rows in truth.queries.items()}
    dataset = {"train_size": len(train), "val_size": queries["validation"]}
    dataset["total_size"] = len(train) + queries["validation"] + queries["test"]
    about = (
        f"A student with {settings['objective']} at temperature {settings['tau']:g}, seed {seed}"
    )
    params = {"seed": seed, **settings} | ({"quick": True} if is_quick(settings) else {})
    with (
        WorkDirectory(files.work.folder, fingerprint) as work,
        _ended(run_dir, facts, work) as summary,
        ExperimentTracker(work.path, name, about, None, params, paths, dataset) as tracker,
    ):
        summary["started_at"] = tracker.metadata["created_at"]
        start = partial(StudentTask, settings, seed, vectors, truth, run_dir, work.checkpoints)
        task, result = _fit(start, work, tracker, name)
        student = task.student
        student.save(files.best)
        scores = score_all("student", student.encode(vectors["database"]), truth)
        write_parquet(files.scores, scores)
        write_logs(run_dir, result.logs)
        last = result.logs.row(-1, named=True)
        results = {"best_step": result.best_step, f"best_{RECALL}": result.best_metric}
        results |= {f"final_{name}": last[name] for name in (RECALL, NDCG, "loss")}
        results["num_parameters"] = sum(p.numel() for p in student.parameters())
        results["batch_size"] = task.settings["batch_size"]
        tracker.finish(results)
        summary |= results
    published.keep()
    return summary


def _fit(
    start: Callable[..., StudentTask], work: WorkDirectory, tracker: ExperimentTracker, name: str
) -> tuple[StudentTask, LoopResult]:
    """Train, and halve the batch whenever it does not fit; a resumed run keeps the size."""
    accelerator = Accelerator()
    while True:
        task = start(accelerator.device, name)
        try:
            return task, train_loop(task, task.loop, work, tracker, accelerator)
        except Exception as error:
            size = task.settings["batch_size"]
            too_large = should_reduce_batch_size(error) or isinstance(error, MemoryError)
            if not too_large or size == 1:
                raise
        message = f"a batch of {size} does not fit in memory; continuing with {size // 2}"
        print(f"{name}: {message}", file=sys.stderr, flush=True)
        tracker.add_issue(message)
        write_json(task.size_path, size // 2)


@contextmanager
def _ended(
    run_dir: Path, facts: Mapping[str, Any], work: WorkDirectory
) -> Iterator[dict[str, Any]]:
    """Write `train_summary.json` when an attempt ends, and without success also the log up to the
    last checkpoint."""
    summary: dict[str, Any] = dict(facts)
    try:
        yield summary
        summary |= {"status": "completed", "ended_at": now()}
    except BaseException as error:
        interrupted = isinstance(error, SystemExit | KeyboardInterrupt)
        status = "interrupted" if interrupted else "failed"
        summary |= {
            "status": status,
            "ended_at": now(),
            "error": f"{type(error).__name__}: {error}",
        }
        if (checkpoint := work.latest()) is not None:
            write_logs(run_dir, checkpoint.logs)
        raise
    finally:
        write_json(StudentFolder(run_dir).summary, summary)


class StudentTask(Task):
    """A student, as the loop trains it.

    Args:
        checkpoints: The folder that remembers a batch size that was halved.
        name: In messages.
    """

    watch, higher_is_better, counted = RECALL, True, "anchors"

    def __init__(
        self,
        settings: Mapping[str, Any],
        seed: int,
        vectors: Mapping[str, Floats],
        truth: Truth,
        run_dir: Path,
        checkpoints: Path,
        device: torch.device,
        name: str,
    ):
        self.vectors, self.truth, self.run_dir = vectors, truth, run_dir
        self.description, self.step = name, 0
        self.size_path = checkpoints / "batch_size.json"
        self.settings = dict(settings)
        if self.size_path.is_file():
            self.settings["batch_size"] = json.loads(self.size_path.read_text())
        train = vectors["pool"]
        self.student = build_student(settings, train, seed)
        self.objective = build_objective(self.student, train, truth, self.settings, seed)
        self.objective.to(device)
        self.trainable = dict(self.student.named_parameters())
        matrices = {n: p for n, p in self.trainable.items() if p.ndim > 1}
        decayed = [p for n, p in matrices.items() if n != "map.weight"]
        others = [p for p in self.trainable.values() if all(p is not q for q in decayed)]
        groups = [
            {"name": "decayed", "params": decayed, "weight_decay": settings["weight_decay"]},
            {"name": "others", "params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=settings["lr"])

    @property
    def loop(self) -> LoopSettings:
        settings = self.settings
        return LoopSettings(
            num_steps=settings["steps"],
            warmup_steps=settings["warmup"],
            lr_schedule=settings["lr_schedule"],
            min_lr_ratio=MIN_LR_RATIO,
            eval_interval=settings["eval_every"],
            save_interval=settings["save_every"],
            log_interval=LOG_INTERVAL,
        )

    def loss(self, step: int) -> tuple[Tensor, dict[str, Any]]:
        self.step = step + 1
        return self.objective(None, step)

    def validate(self, step: int, tracker: ExperimentTracker) -> dict[str, float]:
        encoded = self.student.encode(self.vectors["database"])
        rows = self.truth.queries["validation"]
        recall, ndcg = score_vectors(
            encoded[rows], encoded, rows, self.truth.relevant["validation"]
        )
        return {RECALL: float(recall.mean()), NDCG: float(ndcg.mean())}

    def write(self, folder: Path) -> None:
        """Write student and queue of a checkpoint. Every `save_every` steps and at the end, also
        publish the student as `checkpoints/student_step_<N>.safetensors`."""
        step, settings = self.step, self.settings
        self.student.save(folder / STUDENT_NAME)
        if step and (step % settings["save_every"] == 0 or step == settings["steps"]):
            self.student.save(StudentFolder(self.run_dir).checkpoint(step))
        state = self.objective.state_dict()
        queue = {name: x for name, x in state.items() if not name.startswith("student.")}
        save_file(queue, folder / QUEUE_NAME)

    def read(self, folder: Path) -> None:
        self.student.load_state_dict(Student.load(folder / STUDENT_NAME).state_dict())
        queue, _ = read_safetensors(folder / QUEUE_NAME)
        self.objective.load_state_dict(queue, strict=False)  # without the student
