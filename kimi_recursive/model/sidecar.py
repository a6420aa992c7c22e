"""The sidecar on disk: what was trained around and inside a base, without the base."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from kimi_recursive.files import read_safetensors, replacing
from kimi_recursive.model.config import (
    CONFIG_NAME,
)
from kimi_recursive.model.placement import embedding_weight
from kimi_recursive.model.wrapper import ChunkRefineWrapper

SIDECAR_NAME = "sidecar.safetensors"
METADATA_KEY = "kimi_recursive"


def base_identity(base: PreTrainedModel) -> dict[str, Any]:
    """What a sidecar must find again: the base's shape, and a digest of its first embeddings."""
    config = base.config.get_text_config()
    rows = embedding_weight(base)[:16].float().cpu().contiguous()
    return {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "embedding_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
    }


def save_sidecar(
    wrapper: ChunkRefineWrapper,
    directory: str | Path,
    base_path: str | Path,
    phase: str | None = None,
    revision: str | None = None,
) -> None:
    """Write `sidecar.safetensors`, `recursive_config.json`, and what was trained inside the base
    (`kimi_recursive.model.adapter`); the base is named, not copied.

    Args:
        phase: The training phase that made it; None before training.
        revision: Of the base, where `base_path` is a Hub id.

    Raises:
        ValueError: recursion is disabled, so there is no sidecar.
    """
    if not wrapper.config.recursive_enabled:
        raise ValueError("recursion is disabled: there is no sidecar to save")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    base_path = str(base_path)
    if Path(base_path).is_dir():  # relative to the sidecar, so that the two can move together
        base_path = os.path.relpath(Path(base_path).resolve(), directory.resolve())
    facts = {
        "base_model_name_or_path": base_path,
        "base": base_identity(wrapper.base),
        "refined_layers": wrapper.refined_layers,
        "revision": revision,
        "phase": phase,
        "lora": bool(wrapper.adapter and wrapper.adapter.lora),
        "unfrozen_layers": wrapper.adapter.layers if wrapper.adapter else [],
        "dtype": str(wrapper.base.dtype).removeprefix("torch."),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in wrapper.sidecar_state_dict().items()}
    _write_sidecar(directory / SIDECAR_NAME, facts, tensors)
    wrapper.config.save(directory / CONFIG_NAME)
    if wrapper.adapter is not None:
        wrapper.adapter.save(directory)


def rename_base(sidecar: Path, target: Path, base: str | None, revision: str | None) -> None:
    """Copy `sidecar.safetensors` with another name for its base: a Hub id, a path relative to the
    sidecar's folder, or None, so that whoever loads it has to say where the base is.

    Raises:
        ValueError: damaged file, or none of ours.
    """
    facts, tensors = read_sidecar(sidecar)
    facts |= {"base_model_name_or_path": base, "revision": revision}
    _write_sidecar(target, facts, tensors)


def _write_sidecar(path: Path, facts: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    # One key: safetensors writes several in no fixed order, and equal sidecars must be equal files.
    with replacing(path) as temporary:
        metadata = {METADATA_KEY: json.dumps(facts, sort_keys=True)}
        save_file(tensors, temporary, metadata=metadata)


def load_sidecar(wrapper: ChunkRefineWrapper, directory: str | Path) -> None:
    """Load sidecar weights onto a wrapper, and into its base what was trained there.

    Raises:
        ValueError: missing or damaged file, another base, or other shapes.
    """
    path = Path(directory) / SIDECAR_NAME
    facts, tensors = read_sidecar(path)
    made_for, here = facts["base"], base_identity(wrapper.base)
    differs = [key for key, value in made_for.items() if here.get(key) != value]
    if differs:
        detail = ", ".join(f"{k} {made_for[k]} (this base: {here.get(k)})" for k in differs)
        raise ValueError(f"{path}: does not fit this base; it was made for {detail}")
    if facts["refined_layers"] != wrapper.refined_layers:
        raise ValueError(
            f"{path}: does not fit this config: its cells are of layers "
            f"{facts['refined_layers']}, layers_to_refine asks for {wrapper.refined_layers}"
        )
    expected = wrapper.sidecar_state_dict()
    for name in sorted(expected.keys() | tensors.keys()):
        have = tuple(tensors[name].shape) if name in tensors else "missing"
        want = tuple(expected[name].shape) if name in expected else "no such weight"
        if have != want:
            raise ValueError(f"{path}: does not fit this config: {name} is {have}, needs {want}")
    wrapper.load_state_dict(tensors, strict=False)
    if facts["lora"] or facts["unfrozen_layers"]:
        from kimi_recursive.model.adapter import load_adapter

        wrapper.adapter = load_adapter(
            Path(directory),
            wrapper.adapter,
            wrapper.base,
            wrapper.layers,
            facts["unfrozen_layers"],
            facts["lora"],
        )
    elif wrapper.adapter is not None:
        raise ValueError(f"{path}: has no adapter, and this wrapper has one; drop it first")


def base_of(model_path: str | Path) -> str:
    """The base of a model path: the path itself, or what its sidecar names.

    Raises:
        ValueError: a local path that is no directory, or a damaged sidecar.
    """
    sidecar = Path(model_path) / SIDECAR_NAME
    where = sidecar_base_path(sidecar) if sidecar.is_file() else str(model_path)
    if is_local(where) and not Path(where).is_dir():
        raise ValueError(f"{where}: no such model directory")
    return where


def sidecar_base_path(sidecar: Path) -> str:
    """Where a sidecar says its base is: a local directory, or a Hub id.

    Raises:
        ValueError: damaged file, none of ours, or published without its base.
    """
    name = read_sidecar(sidecar, weights=False)[0]["base_model_name_or_path"]
    if name is None:
        raise ValueError(
            f"{sidecar}: was published without its base; "
            "load_model_with_config(..., base_path=...) names it"
        )
    local = sidecar.parent.resolve() / name  # where links lead, as when it was written
    return str(local.resolve()) if local.is_dir() or is_local(name) else name


def sidecar_facts(directory: str | Path) -> dict[str, Any]:
    """What a sidecar says of itself: `base_model_name_or_path` (None when published without),
    `base` (its identity), `revision`,
    `refined_layers`, `phase` (None before training), `lora`, `unfrozen_layers`, `dtype`.

    Raises:
        ValueError: missing or damaged file, or none of ours.
    """
    return read_sidecar(Path(directory) / SIDECAR_NAME, weights=False)[0]


def read_sidecar(
    path: Path, weights: bool = True
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    tensors, metadata = read_safetensors(path, weights)
    if METADATA_KEY not in metadata:
        raise ValueError(f"{path}: is no sidecar (it does not name its base)")
    before = {"revision": None, "phase": None, "lora": False, "unfrozen_layers": []}
    return {**before, **json.loads(metadata[METADATA_KEY])}, tensors


def is_local(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()
