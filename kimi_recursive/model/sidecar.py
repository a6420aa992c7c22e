"""The sidecar: a folder with what was trained around and inside a base, without the base.

`sidecar.safetensors` holds the cells (refinement cells, latent path, boundary head) and, in its
header, what `Sidecar` says. `recursive_config.json` is beside it, and so is what was trained inside
the base (`kimi_recursive.model.adapter`). `config.json` tells transformers' Auto classes what the
folder is; nothing else is read from it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from kimi_recursive.doors import missing_extra
from kimi_recursive.files import read_safetensors, replacing, write_json
from kimi_recursive.layout import SIDECAR_NAME, RunFolder
from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.model.loop import ChunkLoop
from kimi_recursive.model.placement import embedding_weight
from kimi_recursive.model.quantization import quantization_of
from kimi_recursive.model.weights import misfit, read_weights

METADATA_KEY = "kimi_recursive"
MODEL_TYPE, NATIVE_CLASS = "kimi_recursive", "KimiRecursiveForCausalLM"


@dataclass(frozen=True)
class Sidecar:
    """What the header of a saved sidecar says.

    Attributes:
        folder: The folder of the sidecar.
        base_name: The base: a Hub id, or a path relative to `folder`; None when it was published
            without one.
        revision: Revision of a base on the Hub, or None.
        base: Identity of the base, as `base_identity` gives it.
        refined_layers: Decoder layers with a refinement cell, ascending.
        phase: The training phase that made it, or None before training.
        lora: Whether the base has LoRA.
        unfrozen_layers: Decoder layers that were trained whole, ascending.
        dtype: Data type of the base it was trained on, such as `float32`.
    """

    folder: Path
    base_name: str | None
    revision: str | None
    base: Mapping[str, Any]
    refined_layers: list[int]
    phase: str | None
    lora: bool
    unfrozen_layers: list[int]
    dtype: str

    @classmethod
    def open(cls, folder: str | Path) -> Sidecar:
        """Read the header of the sidecar in `folder`.

        Raises:
            ValueError: the file is missing or damaged, or has no such header.
        """
        path = Path(folder) / SIDECAR_NAME
        _, metadata = read_safetensors(path, weights=False)
        try:
            facts = json.loads(metadata[METADATA_KEY])
            return cls(
                folder=Path(folder),
                base_name=facts["base_model_name_or_path"],
                revision=facts.get("revision"),
                base=facts["base"],
                refined_layers=facts["refined_layers"],
                phase=facts.get("phase"),
                lora=facts.get("lora", False),
                unfrozen_layers=facts.get("unfrozen_layers", []),
                dtype=facts.get("dtype", "auto"),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: is no sidecar (its header does not name a base)") from error

    @classmethod
    def find(cls, model_path: str | Path) -> Sidecar | None:
        """The sidecar in the folder `model_path`, or None where there is none, as in a base.

        Raises:
            ValueError: the sidecar is damaged.
        """
        return cls.open(model_path) if (Path(model_path) / SIDECAR_NAME).is_file() else None

    @property
    def path(self) -> Path:
        """The file with the cells."""
        return self.folder / SIDECAR_NAME

    def config(self) -> RecursiveConfig:
        """The config beside the cells.

        Raises:
            ValueError: the file is missing or damaged, or holds an invalid value.
        """
        path = self.folder / CONFIG_NAME
        return RecursiveConfig.from_file(path).validated(str(path))

    def base_path(self) -> str:
        """Where the base is: the path of a local folder, or a Hub id.

        Raises:
            ValueError: the sidecar was published without its base.
        """
        if self.base_name is None:
            raise ValueError(
                f"{self.path}: was published without its base; "
                "load_model_with_config(..., base_path=...) names it"
            )
        local = self.folder.resolve() / self.base_name  # follows links, as when it was written
        found = local.is_dir() or is_local(self.base_name)
        return str(local.resolve()) if found else self.base_name

    def tensors(self) -> dict[str, Tensor]:
        """The weights of the cells by name, on the CPU.

        Raises:
            ValueError: the file is damaged, or a weight is not finite.
        """
        return read_weights(self.path)

    def renamed(self, base_name: str | None, revision: str | None, path: str | Path) -> None:
        """Write a copy of `sidecar.safetensors` to `path` that names its base differently.

        Args:
            base_name: A Hub id, a path relative to the folder of `path`, or None: then whoever
                loads the copy says where the base is.
            revision: Of a Hub id.
        """
        tensors, metadata = read_safetensors(self.path)
        facts = json.loads(metadata[METADATA_KEY])
        facts |= {"base_model_name_or_path": base_name, "revision": revision}
        _write(Path(path), facts, tensors)


def base_of(model: str | Path | Sidecar) -> str:
    """Where the base of a model is: the base that its sidecar names, or the model itself.

    Args:
        model: A base (folder or Hub id), or a sidecar (folder, or already open).

    Raises:
        ValueError: a folder that is missing or holds a run, or a damaged sidecar.
    """
    sidecar = model if isinstance(model, Sidecar) else Sidecar.find(model)
    where = str(model) if sidecar is None else sidecar.base_path()
    if is_local(where) and not Path(where).is_dir():
        raise ValueError(f"{where}: no such model directory")
    inside = RunFolder(Path(where)).sidecar
    if (inside / SIDECAR_NAME).is_file() and not (Path(where) / "config.json").is_file():
        raise ValueError(f"{where}: is the folder of a run; its model is {inside}")
    return where


def is_local(name: str) -> bool:
    """Whether a model name is a path, not a Hub id."""
    return name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).exists()


def base_identity(base: PreTrainedModel) -> dict[str, Any]:
    """What a sidecar must find again: the base's shape, a digest of its first embeddings, and the
    library of a quantised base."""
    config = base.config.get_text_config()
    rows = embedding_weight(base)[:16].float().cpu().contiguous()
    identity = {
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "vocab_size": config.vocab_size,
        "embedding_sha256": hashlib.sha256(rows.numpy().tobytes()).hexdigest(),
    }
    quantized = quantization_of(base)  # left out otherwise, as in sidecars of before
    return identity | ({"quantization": quantized} if quantized else {})


def save_sidecar(
    wrapper: ChunkLoop,
    directory: str | Path,
    base_path: str | Path | None,
    phase: str | None = None,
    revision: str | None = None,
) -> None:
    """Write the sidecar of a wrapper. The base is named in it, not copied.

    Args:
        directory: The folder of the sidecar; made where it is missing.
        base_path: The base: a folder, or a Hub id; None leaves it to whoever loads the sidecar.
        phase: The training phase that made it; None before training.
        revision: Of the base, where `base_path` is a Hub id.

    Raises:
        ValueError: recursion is disabled, so there is no sidecar.
    """
    if not wrapper.config.recursive_enabled:
        raise ValueError("recursion is disabled: there is no sidecar to save")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (
        base_path is not None and Path(base_path).is_dir()
    ):  # a relative path, so that both can move together
        base_path = os.path.relpath(Path(base_path).resolve(), directory.resolve())
    adapter = wrapper.adapter
    facts = {
        "base_model_name_or_path": None if base_path is None else str(base_path),
        "base": base_identity(wrapper.base),
        "refined_layers": wrapper.refined_layers,
        "revision": revision,
        "phase": phase,
        "lora": bool(adapter and adapter.lora),
        "unfrozen_layers": adapter.layers if adapter else [],
        "dtype": str(wrapper.base.dtype).removeprefix("torch."),
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in wrapper.cells_state_dict().items()}
    _write(directory / SIDECAR_NAME, facts, tensors)
    wrapper.config.save(directory / CONFIG_NAME)
    write_native_config(directory)
    if adapter is not None:
        adapter.save(directory)


def write_native_config(directory: Path) -> None:
    """Write the `config.json` by which transformers' Auto classes know a sidecar."""
    write_json(
        directory / "config.json", {"architectures": [NATIVE_CLASS], "model_type": MODEL_TYPE}
    )


def _write(path: Path, facts: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    # One key: safetensors writes several in no fixed order, and equal sidecars must be equal files.
    with replacing(path) as temporary:
        metadata = {METADATA_KEY: json.dumps(facts, sort_keys=True)}
        save_file(tensors, temporary, metadata=metadata)


def load_sidecar(wrapper: ChunkLoop, sidecar: str | Path | Sidecar) -> None:
    """Load the cells into a wrapper, and into its base what was trained there.

    Args:
        sidecar: A folder, or a sidecar that is already open.

    Raises:
        ValueError: a missing or damaged file, another base, other shapes, a weight that is not
            finite, or LoRA without peft installed.
    """
    if not isinstance(sidecar, Sidecar):
        sidecar = Sidecar.open(sidecar)
    made_for, here = sidecar.base, base_identity(wrapper.base)
    differs = [key for key, value in made_for.items() if here.get(key) != value]
    if differs:
        detail = ", ".join(f"{k} {made_for[k]} (this base: {here.get(k)})" for k in differs)
        raise ValueError(f"{sidecar.path}: does not fit this base; it was made for {detail}")
    if sidecar.refined_layers != wrapper.refined_layers:
        raise ValueError(
            f"{sidecar.path}: does not fit this config: its cells are of layers "
            f"{sidecar.refined_layers}, layers_to_refine asks for {wrapper.refined_layers}"
        )
    tensors, expected = sidecar.tensors(), wrapper.cells_state_dict()
    if problem := misfit(tensors, expected):
        raise ValueError(f"{sidecar.path}: does not fit this config: {problem}")
    wrapper.load_state_dict(tensors, strict=False)
    wrapper.phase, wrapper.revision = sidecar.phase, sidecar.revision
    if sidecar.lora or sidecar.unfrozen_layers:
        with missing_extra("lora", "A model of phase b or c"):
            from kimi_recursive.model.adapter import load_adapter

        wrapper.adapter = load_adapter(
            sidecar.folder,
            wrapper.adapter,
            wrapper.base,
            wrapper.layers,
            sidecar.unfrozen_layers,
            sidecar.lora,
        )
    elif wrapper.adapter is not None:
        raise ValueError(
            f"{sidecar.path}: has no adapter, but this wrapper has one; call drop_adapter() first"
        )
