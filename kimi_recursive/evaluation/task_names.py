"""Where tasks of lm-evaluation-harness are found by their names. Imports no torch: a matrix looks
before its first job starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from lm_eval.tasks import TaskManager

from kimi_recursive.evaluation.settings import TaskSettings
from kimi_recursive.text import WIDTH, cut, did_you_mean, shown


def find_tasks(settings: TaskSettings, corpus: str | Path = "") -> TaskManager:
    """Where the tasks are found by name: in `include_path`, and in the harness where they are not
    all there, as reading the names of all its tasks takes seconds.

    Raises:
        ValueError: a name that is not there.
    """
    options = {"include_path": settings.include_path, "metadata": {"corpus": str(corpus)}}
    manager = TaskManager(include_defaults=False, **options)
    if next(_unknown(manager, settings.names), None) is not None:
        manager = TaskManager(**options)
        for name in settings.names:
            if name not in manager.task_index:
                near = cut(did_you_mean(name, manager.all_tasks, "there are"), WIDTH)
                raise ValueError(f"evaluation.tasks.names: unknown task {shown(name)}; {near}")
    return manager


def _unknown(manager: TaskManager, names: Sequence[str]) -> Iterator[str]:
    """The names that are not there, and those in groups."""
    for name in names:
        entry = manager.task_index.get(name)
        if entry is None:
            yield name
        elif isinstance(members := (entry.cfg or {}).get("task"), list):
            yield from _unknown(manager, [m for m in members if isinstance(m, str)])
