"""Checkpoints of a training run: complete or absent, checked before use, found again after a kill.

A work directory belongs to one process at a time (`WorkDirectory` holds a lock) and to one
computation (a fingerprint). It holds the last two checkpoints, and those that they name as best:

    <work>/fingerprint.json
    <work>/checkpoints/best              link to the best checkpoint so far
    <work>/checkpoints/step_000100/
        model/                           all that trains; `load_model_with_config` loads it
        optimizer.pt, scheduler.pt       their states, and the RNG's; loaded with weights_only=True
        recursive_config.json            of a recursive model
        train_logs.parquet               one row for each step so far
        checkpoint_metadata.json         step, metrics, and the sha256 of every other file

With the folders that `kimi_recursive.training.experiment` adds, it is the experiment directory.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors import SafetensorError

from kimi_recursive.files import file_digest
from kimi_recursive.model.config import CONFIG_NAME
from kimi_recursive.training.settings import NUM_KEPT

METADATA_NAME = "checkpoint_metadata.json"
MODEL_DIR = "model"
BEST_NAME = "best"


@dataclass
class Checkpoint:
    """State after `step` optimizer steps, without the model.

    Attributes:
        state: Optimizer and RNG state; tensors, numbers, strings and containers of them.
        scheduler: State of the learning-rate scheduler.
        logs: One row for each step so far.
        metadata: JSON values; `best_step` names the checkpoint with the best weights so far.
    """

    step: int
    state: dict[str, Any]
    scheduler: dict[str, Any]
    logs: pl.DataFrame
    metadata: dict[str, Any]


class WorkDirectory:
    """The undeclared folder beside a run's outputs, where its checkpoints live.

    Use as a context manager; the lock is held inside.

    Args:
        path: Created when missing.
        fingerprint: What the run computes (parameters, digests of its inputs, numerics version).
            Checkpoints of another computation are removed, with a message.
        num_kept: How many checkpoints to keep, beside the best ones; None for all.
        refuse_others: Raise instead of removing checkpoints of another computation.

    Raises:
        ValueError: another process holds the lock, or another computation is refused.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: dict[str, Any],
        num_kept: int | None = NUM_KEPT,
        refuse_others: bool = False,
    ):
        self.path = Path(path)
        self.num_kept = num_kept
        self.refuse_others = refuse_others
        self.fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True, default=str))
        self.checkpoints = self.path / "checkpoints"

    def __enter__(self) -> WorkDirectory:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            message = f"{self.path}: another process is training in this folder"
            raise BlockingIOError(message) from error
        self._claim()
        return self

    def __exit__(self, *_exc) -> None:
        self._lock.close()

    def _claim(self) -> None:
        path = self.path / "fingerprint.json"
        if path.is_file() or self._complete():
            before = json.loads(path.read_text()) if path.is_file() else {}
            changed = _differing(before, self.fingerprint)
            if changed and self.refuse_others:
                self._lock.close()
                raise ValueError(
                    f"{self.path}: holds another experiment, with a different "
                    f"{', '.join(changed)}; choose another name, or --force to start it afresh"
                )
            if changed:
                _say(f"{self.path}: starting afresh, {', '.join(changed)} changed")
                shutil.rmtree(self.checkpoints, ignore_errors=True)
        _write_synced(path, json.dumps(self.fingerprint, indent=2).encode())
        self.checkpoints.mkdir(exist_ok=True)

    def folder(self, step: int) -> Path:
        """The folder of a step's checkpoint; it need not exist."""
        return self.checkpoints / f"step_{step:06d}"

    def save(self, checkpoint: Checkpoint, write_model: Callable[[Path], None]) -> None:
        """Write a checkpoint under a temporary name, sync it, rename it, drop what is too old.

        Args:
            write_model: Writes the model into the folder that it is given.

        Raises:
            ValueError: the checkpoint cannot be written (a full disk). Earlier ones are kept.
        """
        try:
            self._save(checkpoint, write_model)
        except (OSError, SafetensorError, RuntimeError, pl.exceptions.PolarsError) as error:
            shutil.rmtree(self._temporary(checkpoint.step), ignore_errors=True)
            raise ValueError(
                f"{self.checkpoints}: the checkpoint of step {checkpoint.step} cannot be written: "
                f"{str(error).splitlines()[0]}; earlier ones are kept"
            ) from error

    def _temporary(self, step: int) -> Path:
        return self.checkpoints / f".step_{step:06d}.tmp"

    def _save(self, checkpoint: Checkpoint, write_model: Callable[[Path], None]) -> None:
        target = self.folder(checkpoint.step)
        temporary = self._temporary(checkpoint.step)
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / MODEL_DIR).mkdir(parents=True)
        write_model(temporary / MODEL_DIR)
        if (temporary / MODEL_DIR / CONFIG_NAME).is_file():
            shutil.copy(temporary / MODEL_DIR / CONFIG_NAME, temporary)
        torch.save(checkpoint.state, temporary / "optimizer.pt")
        torch.save(checkpoint.scheduler, temporary / "scheduler.pt")
        checkpoint.logs.write_parquet(temporary / "train_logs.parquet")
        written = sorted(temporary.rglob("*"))
        files = [path for path in written if path.is_file()]
        for path in written:
            _sync(path)
        metadata = {
            "step": checkpoint.step,
            **checkpoint.metadata,
            "sha256": {str(path.relative_to(temporary)): file_digest(path) for path in files},
        }
        _write_synced(temporary / METADATA_NAME, json.dumps(metadata, indent=2).encode())
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        self.mark_best(checkpoint.metadata["best_step"])
        _sync(self.checkpoints)
        self._drop_old(checkpoint.step)

    def mark_best(self, step: int) -> None:
        """Let the link `best` point to the checkpoint of a step."""
        temporary = self.checkpoints / f".{BEST_NAME}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(self.folder(step).name)
        os.replace(temporary, self.checkpoints / BEST_NAME)

    def _drop_old(self, newest: int) -> None:
        """Remove the checkpoints that are not kept, and those after `newest`, which are damaged."""
        complete = self._complete()
        for path in complete[complete.index(self.folder(newest)) + 1 :]:
            shutil.rmtree(path)
            complete.remove(path)
        if self.num_kept is None:
            return
        kept = set(complete[-self.num_kept :])
        for path in complete[-self.num_kept :]:
            with suppress(OSError, ValueError, KeyError):  # damaged, and skipped
                kept.add(self.folder(_metadata(path)["best_step"]))
        for path in complete:
            if path not in kept:
                shutil.rmtree(path)

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint whose best one is undamaged too, or None. A message names
        each one that is skipped."""
        for path in reversed(self._complete()):
            try:
                verify_checkpoint(path)
                verify_checkpoint(self.folder(_metadata(path)["best_step"]), f"{MODEL_DIR}/")
                return _load(path)
            except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
                _say(f"{path}: damaged checkpoint skipped ({str(error).splitlines()[0]})")
        return None

    def _complete(self) -> list[Path]:
        return complete_checkpoints(self.path)


def complete_checkpoints(directory: str | Path) -> list[Path]:
    """The checkpoints of an experiment directory, by step."""
    found = Path(directory, "checkpoints").glob("step_*")
    numbered = [path for path in found if re.fullmatch(r"step_\d+", path.name)]
    return sorted(numbered, key=lambda path: int(path.name[5:]))


def _differing(before: Any, now: Any, where: str = "") -> list[str]:
    """The dotted keys whose values differ. A key that is None says no more than one that is absent.
    A section that only one of the two has is named as a whole."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return [] if before == now else [where]
    return [
        name
        for key in sorted(before.keys() | now.keys())
        for name in _differing(before.get(key), now.get(key), f"{where}.{key}" if where else key)
    ]


def _metadata(path: Path) -> dict[str, Any]:
    return json.loads((path / METADATA_NAME).read_text())


def verify_checkpoint(path: Path, part: str = "") -> list[str]:
    """Check the files of a checkpoint whose name begins with `part`, and return their names.

    Raises:
        ValueError: one does not match its checksum.
        OSError, KeyError: one is missing, or the checksums are.
    """
    names = []
    for name, digest in _metadata(path)["sha256"].items():
        if name.startswith(part):
            if file_digest(path / name) != digest:
                raise ValueError(f"{name} of {path.name} does not match its checksum")
            names.append(name)
    return names


def _load(path: Path) -> Checkpoint:
    metadata = _metadata(path)
    del metadata["sha256"]
    state, scheduler = (
        torch.load(path / name, weights_only=True, map_location="cpu")
        for name in ("optimizer.pt", "scheduler.pt")
    )
    logs = pl.read_parquet(path / "train_logs.parquet")
    return Checkpoint(metadata.pop("step"), state, scheduler, logs, metadata)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    _sync(temporary)
    os.replace(temporary, path)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
