"""A pretrained base, put into a directory of the workflow."""

from __future__ import annotations

import shutil
import tempfile
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

from kimi_recursive.doors import missing_extra
from kimi_recursive.files import packaged_file, publishing, read_json_object, write_json
from kimi_recursive.model.quantization import save_quantized
from kimi_recursive.text import first_line
from kimi_recursive.training.settings import PACKAGES

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def fetch_base(
    output_dir: Path,
    path: str | None = None,
    hub_id: str | None = None,
    revision: str | None = None,
    gguf_file: str | None = None,
    package: str | None = None,
    quantization: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Put a pretrained decoder into a directory of the workflow.

    A local directory is linked file by file; a Hub id is downloaded at its pinned revision. A GGUF
    file becomes a directory of transformers, with its weights in float32.

    Args:
        path: A local directory; or else
        hub_id, revision: a model on the Hub; or else
        package: One of `PACKAGES`.
        gguf_file: The GGUF file in that directory, or of that model on the Hub.
        quantization: `8bit` or `4bit`: quantise it (`kimi_recursive.model.quantization`).
        dtype: Of what is not quantised then.
        trust_remote_code: Run code that comes with the checkpoint, to quantise it.

    Raises:
        ValueError: no such directory, file or package, the Hub cannot serve it, transformers
            cannot read the GGUF file, or as in `save_quantized`.
    """
    if package is not None:
        source = base_package(package)
    elif path is not None:
        source = Path(path).resolve() / (gguf_file or "config.json")
        if not source.is_file():
            what = f"GGUF file {gguf_file}" if gguf_file else "Hugging Face model (no config.json)"
            raise ValueError(f"base.path: {source.parent} holds no {what}")
    else:
        assert hub_id is not None, "a pretrained base has a path, a Hub id or a package"
        try:
            if gguf_file:
                source = Path(hf_hub_download(hub_id, gguf_file, revision=revision))
            else:
                source = Path(snapshot_download(hub_id, revision=revision)) / "config.json"
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            message = first_line(error)
            raise ValueError(f"base.hub_id: {hub_id} cannot be fetched: {message}") from error
    origin = {"path": path, "hub_id": hub_id, "revision": revision}
    if quantization:
        with tempfile.TemporaryDirectory(prefix="kimi-recursive-") as scratch:
            whole = Path(scratch) / "model"
            fetch_base(whole, path, hub_id, revision, gguf_file, package)
            with publishing(output_dir) as folder:
                save_quantized(whole, folder, quantization, dtype, trust_remote_code)
                _copy_tokenizer(whole, folder)
                origin = read_json_object(whole / "origin.json")
                origin |= {"hub_id": None, "of": hub_id, "quantization": quantization}
                write_json(folder / "origin.json", origin)
        return
    with publishing(output_dir) as folder:
        if gguf_file or package:
            convert_gguf(source, folder)
            # What is here is not what that Hub id holds, so no sidecar may name it as its base.
            origin = {"path": path, "hub_id": None, "revision": None, "package": package}
            origin["gguf"] = f"{hub_id}@{revision}/{gguf_file}" if hub_id else source.name
        else:
            for file in source.parent.iterdir():
                if file.is_file():
                    (folder / file.name).symlink_to(file.resolve())
        write_json(folder / "origin.json", origin)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy what `save_quantized` did not write, except weights."""
    for file in source.iterdir():
        weights = file.name.endswith((*WEIGHTS, ".index.json"))
        if file.is_file() and not weights and not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


def base_package(name: str) -> Path:
    """The GGUF file of one of `PACKAGES`, checked.

    Raises:
        ValueError: as in `packaged_file`.
    """
    version, file, sha256 = PACKAGES[name]
    return packaged_file(name, version, file, sha256, "base.package", "--no-deps ")


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the decoder and the tokenizer of a GGUF file as transformers saves them, in float32:
    what the file's quantised weights stand for, exactly.

    Raises:
        ValueError: transformers cannot read the file, or the package gguf is missing.
    """
    with missing_extra("gguf", file.name):
        import_module("gguf")  # transformers reads the file through it
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        loaded, info = cast("Any", AutoModelForCausalLM).from_pretrained(
            **where, dtype=torch.float32, output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
            raise ValueError(f"{len(missing)} weights are missing, among them {missing[0]}")
        tokenizer = AutoTokenizer.from_pretrained(**where)
    except Exception as error:  # the reader trusts the file: struct.error, OverflowError, KeyError
        raise ValueError(f"{file}: cannot be read as GGUF: {first_line(error)}") from error
    # The loaded model is marked as quantised, and such a one does not save.
    config = deepcopy(loaded.config)
    vars(config).pop("quantization_config", None)
    if (eps := getattr(config, "rms_norm_eps", None)) is not None:
        config.rms_norm_eps = float(str(np.float32(eps)))  # 1e-05, where the file has a float32
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
