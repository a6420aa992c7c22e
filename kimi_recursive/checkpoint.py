"""Checkpoints of a training run: complete or absent, checked before use, found again after a kill.

A work directory belongs to one process at a time (`WorkDirectory` holds a lock) and to one
computation (a fingerprint). It holds the last two checkpoints:

    <work>/fingerprint.json
    <work>/checkpoints/step_000100/
        model.safetensors            weights that train, and the best ones so far
        optimizer.pt                 optimizer state and RNG states, loaded with weights_only=True
        train_logs.parquet           one row for each step so far
        checkpoint_metadata.json     step, metrics, and the sha256 of the other files
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

METADATA_NAME = "checkpoint_metadata.json"
NUM_KEPT = 2


@dataclass
class Checkpoint:
    """State after `step` optimizer steps.

    Attributes:
        tensors: Named tensors (weights that train, best weights).
        state: Optimizer and RNG state; tensors, numbers, strings and containers of them.
        logs: One row for each step so far.
        metadata: JSON values that the run needs again (best metric and its step).
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    logs: pl.DataFrame
    metadata: dict[str, Any]


class WorkDirectory:
    """The undeclared folder beside a run's outputs, where its checkpoints live.

    Use as a context manager; the lock is held inside.

    Args:
        path: Made when missing.
        fingerprint: What the run computes (parameters, digests of its inputs, numerics version).
            Checkpoints of another computation are set aside, with a message.

    Raises:
        ValueError: another process holds the lock.
    """

    def __init__(self, path: str | Path, fingerprint: dict[str, Any]):
        self.path = Path(path)
        self.fingerprint = json.loads(json.dumps(fingerprint, sort_keys=True, default=str))
        self.checkpoints = self.path / "checkpoints"

    def __enter__(self) -> WorkDirectory:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = open(self.path / "lock", "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise ValueError(f"{self.path}: another process is training in this folder") from error
        self._claim()
        return self

    def __exit__(self, *_exc) -> None:
        self._lock.close()

    def _claim(self) -> None:
        path = self.path / "fingerprint.json"
        if self.checkpoints.exists():
            before = json.loads(path.read_text()) if path.is_file() else {}
            changed = sorted(
                key
                for key in before.keys() | self.fingerprint.keys()
                if before.get(key) != self.fingerprint.get(key)
            )
            if changed:
                _say(f"{self.path}: starting afresh, {', '.join(changed)} changed")
                shutil.rmtree(self.checkpoints)
        self.checkpoints.mkdir(exist_ok=True)
        _write_synced(path, json.dumps(self.fingerprint, indent=2).encode())

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write a checkpoint under a temporary name, sync it, rename it, drop the oldest.

        Raises:
            ValueError: it cannot be written (a full disk); the checkpoints before it are kept.
        """
        try:
            return self._save(checkpoint)
        except (OSError, SafetensorError, RuntimeError, pl.exceptions.PolarsError) as error:
            shutil.rmtree(self._temporary(checkpoint.step), ignore_errors=True)
            raise ValueError(
                f"{self.checkpoints}: the checkpoint of step {checkpoint.step} cannot be written: "
                f"{str(error).splitlines()[0]}; those before it are kept"
            ) from error

    def _temporary(self, step: int) -> Path:
        return self.checkpoints / f".step_{step:06d}.tmp"

    def _save(self, checkpoint: Checkpoint) -> Path:
        target = self.checkpoints / f"step_{checkpoint.step:06d}"
        temporary = self._temporary(checkpoint.step)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        save_file(checkpoint.tensors, temporary / "model.safetensors")
        torch.save(checkpoint.state, temporary / "optimizer.pt")
        checkpoint.logs.write_parquet(temporary / "train_logs.parquet")
        files = sorted(temporary.iterdir())
        for path in files:
            _sync(path)
        metadata = {
            "step": checkpoint.step,
            **checkpoint.metadata,
            "sha256": {path.name: file_digest(path) for path in files},
        }
        _write_synced(temporary / METADATA_NAME, json.dumps(metadata, indent=2).encode())
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _sync(self.checkpoints)
        for old in self._complete()[:-NUM_KEPT]:
            shutil.rmtree(old)
        return target

    def latest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint, or None. A damaged one is named and passed over."""
        for path in reversed(self._complete()):
            try:
                return _load(path)
            except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
                _say(f"{path}: damaged checkpoint passed over ({str(error).splitlines()[0]})")
        return None

    def _complete(self) -> list[Path]:
        return sorted(self.checkpoints.glob("step_*"), key=lambda path: int(path.name[5:]))


def _load(path: Path) -> Checkpoint:
    metadata = json.loads((path / METADATA_NAME).read_text())
    for name, digest in metadata.pop("sha256").items():
        if file_digest(path / name) != digest:
            raise ValueError(f"{name} does not match its checksum")
    return Checkpoint(
        step=metadata.pop("step"),
        tensors=load_file(path / "model.safetensors"),
        state=torch.load(path / "optimizer.pt", weights_only=True, map_location="cpu"),
        logs=pl.read_parquet(path / "train_logs.parquet"),
        metadata=metadata,
    )


def file_digest(path: str | Path) -> str:
    """sha256 of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(directory: str | Path) -> str:
    """Digest of a model directory's config and weights: name, size, and up to 64 MiB of each file,
    from its start and its end."""
    digest = hashlib.sha256()
    for path in sorted(Path(directory).iterdir()):
        if path.name == "config.json" or path.suffix in (".safetensors", ".bin"):
            size, part = path.stat().st_size, 32 << 20
            digest.update(f"{path.name} {size}\n".encode())
            with open(path, "rb") as file:
                digest.update(file.read(part))
                file.seek(max(part, size - part))
                digest.update(file.read())
    return digest.hexdigest()


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
