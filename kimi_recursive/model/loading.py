"""Loading a base, alone or with a sidecar."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kimi_recursive.files import read_json_object, read_safetensors
from kimi_recursive.kimi.switch import install_fast_kda
from kimi_recursive.layout import SIDECAR_NAME
from kimi_recursive.model import quantization
from kimi_recursive.model.config import (
    RecursiveConfig,
    get_after_surgery_config,
    get_baseline_config,
)
from kimi_recursive.model.placement import DeviceMap, describe, device_map_options
from kimi_recursive.model.sidecar import Sidecar, base_of, is_local, load_sidecar
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.text import first_line

SIDECAR_INIT_SEED = 0
ADAPTER_CONFIG = "adapter_config.json"  # of peft
# That Hub id has no sidecar, or the Hub cannot be reached and the cache has none.
NO_SIDECAR = (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError, HFValidationError)


def load_base(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device | None = None,
    device_map: DeviceMap | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a Hugging Face decoder in eval mode, with the fast KDA on the CPU.

    Args:
        path: Local directory, or a Hub id (with a pinned `revision`); also of a LoRA adapter, which
            names its base.
        dtype: A torch dtype by name, or `auto` for the checkpoint's own.
        device: Where to put the whole model; by default the CPU.
        device_map: Spreads the layers over several devices, in place of `device`, as in
            transformers: `auto` fills the GPUs, then the CPU, then the disk; a mapping gives module
            names a device each.
        trust_remote_code: Run code that comes with the checkpoint, if transformers has no class for
            the model.

    Raises:
        ValueError: a missing folder, no decoder, damaged weights, missing devices, or a device map
            in one of several processes.
    """
    where = str(path)
    if is_local(where) and not Path(where).is_dir():
        raise ValueError(f"{where}: no such model directory")
    if not (dtype == "auto" or isinstance(getattr(torch, dtype, None), torch.dtype)):
        raise ValueError(f"dtype must be 'auto' or a torch dtype such as 'bfloat16', got {dtype!r}")
    if Sidecar.find(where) is not None:
        raise ValueError(f"{where}: is a sidecar, not a base; load_model_with_config loads it")
    placement = device_map_options(device_map)
    _check_safetensors(Path(where))
    try:
        config, _ = PretrainedConfig.get_config_dict(where, revision=revision)
        known = config.get("model_type") in CONFIG_MAPPING
        with quantization.loading(config, where):
            model, info = cast("Any", AutoModelForCausalLM).from_pretrained(
                where,
                revision=revision,
                dtype=dtype,
                trust_remote_code=trust_remote_code and not known,
                output_loading_info=True,
                **placement,
            )
        if missing := sorted(info["missing_keys"]):  # transformers would draw them at random
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise ValueError(f"the checkpoint has no {missing[0]}{more}")
    except (OSError, ValueError, SafetensorError, HTTPError) as error:
        raise ValueError(f"{where}: cannot be loaded as a decoder: {first_line(error)}") from error
    except (RuntimeError, AssertionError) as error:
        if device_map is None:
            raise
        raise ValueError(f"device_map {device_map}: {first_line(error)}") from error
    if device_map is not None:
        print(f"device_map: {describe(model)}", file=sys.stderr)
    elif device is not None:
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device}: {first_line(error)}") from error
    model.eval()
    quantization.check_quantized(model, where)
    install_fast_kda(model)
    return model


def numeric(load_options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `load_base` that numbers depend on."""
    return {k: v for k, v in load_options.items() if k not in ("device", "device_map")}


def load_tokenizer(
    path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """The tokenizer stored with a model, or None when none is. A LoRA adapter without one has that
    of its base."""
    names = [file.name for file in Path(path).iterdir()] if Path(path).is_dir() else None
    if names is not None and not any(
        name.startswith(("tokenizer", "vocab")) or name.endswith((".model", ".tiktoken"))
        for name in names
    ):
        if ADAPTER_CONFIG not in names:
            return None  # AutoTokenizer would make an empty one for some model types
        path = read_json_object(Path(path) / ADAPTER_CONFIG).get("base_model_name_or_path", path)
    try:
        return AutoTokenizer.from_pretrained(
            str(path), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def load_model_with_config(
    model_path: str | Path | Sidecar,
    config_path: str | Path | None = None,
    config: RecursiveConfig | None = None,
    recursive_enabled: bool | None = None,
    *,
    overrides: Mapping[str, Any] | None = None,
    base_path: str | Path | None = None,
    seed: int = SIDECAR_INIT_SEED,
    **load_options: Any,
) -> tuple[ChunkRefineWrapper, PreTrainedTokenizerBase | None, RecursiveConfig]:
    """Load a model and put the loop around it.

    Args:
        model_path: A base or a saved sidecar: a folder, a Hub id, or a sidecar that is open.
        config_path, config, recursive_enabled: At most one. Without them a sidecar brings its own
            config, and a base alone is loaded with recursion disabled.
        overrides: Parameters to change in that config.
        base_path: Where the sidecar's base is now, if it moved or was not published.
        seed: Decides cells that are not loaded from a sidecar.
        load_options: Passed on to `load_base` (revision, dtype, device, device_map,
            trust_remote_code). For a sidecar on the Hub, `revision` is the sidecar's; the sidecar
            names the revision of its base.

    Returns:
        `(model, tokenizer, config)`; the tokenizer is None when none is stored with the base.

    Raises:
        ValueError: more than one source of config, an invalid config, or a model that does not
            load.
    """
    given = [x for x in (config_path, config, recursive_enabled) if x is not None]
    if len(given) > 1:
        raise ValueError("give at most one of config_path, config and recursive_enabled")
    if isinstance(model_path, Sidecar):
        sidecar = model_path
    else:
        revision = load_options.get("revision")
        model_path, load_options["revision"] = local_model(model_path, revision)
        sidecar = Sidecar.find(model_path)
    if config_path is not None:
        config = RecursiveConfig.from_file(config_path).validated(str(config_path))
    elif recursive_enabled is not None:
        config = get_after_surgery_config() if recursive_enabled else get_baseline_config()
    elif config is None and sidecar is not None:
        config = sidecar.config()
    config = config or get_baseline_config()
    config = RecursiveConfig.from_dict({**config.to_dict(), **(overrides or {})}).validated()

    where = str(base_path or base_of(sidecar or model_path))
    if sidecar is not None:
        load_options["revision"] = load_options.get("revision") or sidecar.revision
        trained = config.recursive_enabled and sidecar.unfrozen_layers
        if trained and load_options.get("dtype", "auto") == "auto":
            load_options["dtype"] = sidecar.dtype  # trained weights are not rounded unasked
    base = load_base(where, **load_options)
    model = build_wrapper(base, config, seed)
    if sidecar is not None and config.recursive_enabled:
        load_sidecar(model, sidecar)
    options = {k: v for k, v in load_options.items() if k in ("revision", "trust_remote_code")}
    return model, load_tokenizer(where, **options), config


def build_wrapper(
    base: PreTrainedModel, config: RecursiveConfig, seed: int = SIDECAR_INIT_SEED
) -> ChunkRefineWrapper:
    """A wrapper in eval mode with fresh cells. They depend on `seed` alone; the global random
    generator keeps its state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ChunkRefineWrapper(base, config).eval()


def local_model(
    model_path: str | Path, revision: str | None = None
) -> tuple[str | Path, str | None]:
    """Fetch a sidecar from the Hub into the Hub's cache; a folder or a base is returned as given.

    Args:
        model_path: A folder or a Hub id.
        revision: Of a Hub id.

    Returns: the path and the given revision; for a sidecar from the Hub, its folder and the
        revision of its base.

    Raises:
        ValueError: the sidecar cannot be fetched, or is damaged.
    """
    where = str(model_path)
    if is_local(where):
        return model_path, revision
    found = False
    try:
        hf_hub_download(where, SIDECAR_NAME, revision=revision)
        found = True
        folder = snapshot_download(where, revision=revision)
    except (HTTPError, OSError, ValueError) as error:
        if isinstance(error, NO_SIDECAR) and not found:
            return model_path, revision
        raise ValueError(f"{where}: cannot be fetched: {first_line(error)}") from error
    return folder, Sidecar.open(folder).revision


def _check_safetensors(directory: Path) -> None:
    """Raise a ValueError that names a damaged file: transformers' error would not."""
    for path in sorted(directory.glob("*.safetensors")) if directory.is_dir() else ():
        read_safetensors(path, weights=False)
