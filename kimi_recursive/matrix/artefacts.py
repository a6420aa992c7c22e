"""Which files a job of the matrix reads, and which files the matrix ends in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kimi_recursive.data.corpus import SPLITS
from kimi_recursive.data.settings import PRETRAIN
from kimi_recursive.data.tasks import task_files
from kimi_recursive.layout import Layout, TextFolder
from kimi_recursive.matrix.runs import (
    Evaluation,
    Training,
    all_evaluations,
    all_trainings,
    repeated,
    surgeries,
    surgery_of,
    task_runs,
)
from kimi_recursive.matrix.settings import Config


def tokenizer_of(config: Config, layout: Layout) -> Path:
    """The tokenizer: a trained one for a base from scratch, else the base's own."""
    return layout.tokenizer if config.base.kind == "scratch" else layout.base.model


def model_of(config: Config, run: Evaluation, layout: Layout) -> Path:
    """What an evaluation loads: the base, the untrained cells, or a trained sidecar."""
    if run.training:
        return layout.run(run.training).sidecar
    if run.seed is None:
        return layout.base.model
    return layout.surgery(surgery_of(config, run.seed).name)


def parent_of(config: Config, run: Training, layout: Layout) -> Path:
    """What a training starts from: the untrained cells, or the sidecar of the phase before."""
    if run.parent:
        return layout.run(run.parent).sidecar
    return layout.surgery(surgery_of(config, run.seed, run.variant).name)


def proof_of(config: Config, run: Training, layout: Layout) -> Path:
    """The zero-init proof of the cells that a training starts from."""
    return layout.proof(surgery_of(config, run.seed, run.variant).proof)


def split_files(config: Config, folder: TextFolder) -> dict[str, Path]:
    """The files of the corpus or of its tokens, by split, and the facts about them."""
    splits = (PRETRAIN, *SPLITS) if config.corpus.has_pretrain else SPLITS
    return {split: folder.split(split) for split in splits} | {"facts": folder.facts}


def source_of(config: Config, layout: Layout) -> Any:
    """`corpus.source`, or the files of the task that takes its place."""
    return task_files(layout.task) if config.corpus.task else config.corpus.source


def harness_files(config: Config) -> list[Path]:
    """The files of the tasks in `evaluation.tasks.include_path`."""
    folder = config.evaluation.tasks.include_path
    found = sorted(Path(folder).rglob("*.*")) if folder else []
    return [path for path in found if path.is_file() and path.suffix != ".pyc"]


def text_files(config: Config, layout: Layout) -> list[Path]:
    """The corpus and its tokens."""
    folders = (layout.corpus, layout.tokens)
    return [path for folder in folders for path in split_files(config, folder).values()]


def matrix_results(config: Config, layout: Layout) -> list[Path]:
    """The results that the summary shows."""
    return [
        *(layout.evaluation(name).results for name in all_evaluations(config)),
        *(layout.proof(cells.proof) for cells in surgeries(config)),
        *([layout.repeat] if repeated(config) else []),
        *(layout.tasks(run.evaluation.name, run.step).results for run in task_runs(config)),
    ]


def matrix_artefacts(config: Config, layout: Layout) -> list[Path]:
    """Every file and folder that the matrix makes, but for the summaries."""
    runs = [layout.run(key) for key in all_trainings(config)]
    return [
        *text_files(config, layout),
        tokenizer_of(config, layout),
        layout.base.model,
        *([layout.base.logs] if config.base.kind == "scratch" else []),
        *(layout.surgery(cells.name) for cells in surgeries(config)),
        *(path for run in runs for path in (run.sidecar, run.logs, run.summary)),
        *(layout.evaluation(name).documents for name in all_evaluations(config)),
        *(layout.tasks(run.evaluation.name, run.step).samples for run in task_runs(config)),
        *matrix_results(config, layout),
    ]


def track_b_artefacts(config: Config, layout: Layout, students: Iterable[str]) -> list[Path]:
    """Every file and folder that Track-B makes, but for its summary.

    Args:
        students: Keys of the runs; none where Track-B is not part of the matrix.
    """
    folders, place = [layout.track_b.student(key) for key in students], layout.track_b
    if not folders:
        return []
    vectors = config.track_b["teacher"]["kind"] == "vectors"
    return [
        *([] if vectors else [place.sentences]),
        *(place.teacher, place.neighbours, place.sanity, place.references),
        *(path for one in folders for path in one.outputs),
    ]


def state_of(paths: Iterable[Path], log: Path) -> list[str]:
    """A rule's parameter that changes when one of these files appears or changes.

    Args:
        log: The rule's own log, which is left out.
    """
    return sorted({f"{path} {path.stat().st_mtime_ns}" for path in paths if path != log})
