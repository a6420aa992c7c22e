"""Where the layers of a base are: on one device, or spread over several by accelerate.

A `device_map` gives each module a device. accelerate's hooks move the inputs of a module to its
device. A module may be offloaded, to the disk or from a GPU to the CPU. Hooks then fetch its
weights for each forward pass, and between passes its parameters are on `meta`.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel

from kimi_recursive.doors import missing_extra
from kimi_recursive.processes.distributed import num_processes
from kimi_recursive.text import shown

DeviceMap = str | Mapping[str, str | int]
STRATEGIES = ("auto", "sequential")  # of accelerate; auto spreads evenly over GPUs


def device_map_options(device_map: DeviceMap | None) -> dict[str, Any]:
    """Arguments of `from_pretrained` that place the layers; none without a device map.

    Weights offloaded to disk that differ from the checkpoint's, such as fused experts, are written
    to a folder under `TMPDIR`, which is deleted when the process ends.

    Raises:
        ValueError: an invalid device map, several processes, or accelerate is not installed.
    """
    if device_map is None:
        return {}
    with missing_extra("spread", "device_map"):
        import_module("accelerate")  # transformers needs it
    if num_processes() > 1:
        raise ValueError(
            f"device_map works in one process only, but {num_processes()} are running: each would "
            "take the same devices"
        )
    if device_map not in STRATEGIES if isinstance(device_map, str) else not device_map:
        raise ValueError(
            f"device_map must be {' or '.join(STRATEGIES)}, or a device for each module, "
            f"got {shown(device_map)}"
        )
    _folders.append(tempfile.TemporaryDirectory(prefix="kimi-recursive-"))
    return {"device_map": device_map, "offload_folder": _folders[-1].name}


def placed(load_options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `load_base`, with the device that training takes where they name none."""
    if load_options.get("device") is not None or load_options.get("device_map") is not None:
        return dict(load_options)
    if find_spec("accelerate") is None:
        return {**load_options, "device": torch.accelerator.current_accelerator(True) or "cpu"}
    from accelerate import PartialState

    return {**load_options, "device": PartialState().device}


_folders: list[tempfile.TemporaryDirectory[str]] = []  # each is deleted with its object


def describe(base: PreTrainedModel) -> str:
    """Where a base is, such as `modules on each device: cuda:0 14, cuda:1 15`. A base on one device
    counts as one module."""
    devices = getattr(base, "hf_device_map", {"": base.device}).values()
    names = Counter(f"cuda:{d}" if isinstance(d, int) else str(d) for d in devices)
    return "modules on each device: " + ", ".join(f"{name} {n}" for name, n in names.items())


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on a module itself."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def execution_device(module: nn.Module) -> torch.device:
    """Where a module computes. The parameters of an offloaded module are elsewhere."""
    for part in module.modules():
        for hook in _hooks(part):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    return next(module.parameters()).device


def is_offloaded(module: nn.Module) -> bool:
    """Whether some of the weights are offloaded: fetched for each pass."""
    return any(getattr(hook, "offload", False) for m in module.modules() for hook in _hooks(m))


def embedding_weight(base: PreTrainedModel) -> Tensor:
    """The token embeddings [V, D], without gradient; fetched when they are offloaded."""
    embeddings: Any = cast("Any", base.get_input_embeddings())
    if not is_offloaded(embeddings):
        return embeddings.weight.detach()
    from accelerate.utils import align_module_device

    with align_module_device(embeddings):
        return embeddings.weight.detach()


class Refetching:
    """Keeps offloaded weights out of autograd's graph: the backward pass fetches them again.

    Otherwise a weight that gradients flow through would stay in memory until the backward pass,
    once for each inner step.
    """

    def __init__(self, base: PreTrainedModel):
        self._fetched: dict[int, tuple[Any, str]] = {}  # by address: hook and name
        for module in base.modules():
            for hook in _hooks(module):
                if getattr(hook, "offload", False):
                    hook.pre_forward = partial(self._fetch, hook, hook.pre_forward)
                    hook.post_forward = partial(self._drop, hook.post_forward)

    def graph(self) -> saved_tensors_hooks:
        """The context in which forward passes are run."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _fetch(self, hook: Any, fetch: Any, module: nn.Module, *args: Any, **kwargs: Any):
        self._forget(module)  # of a pass that an error ended
        inputs = fetch(module, *args, **kwargs)
        for name, weight in module.named_parameters(recurse=hook.place_submodules):
            self._fetched[weight.untyped_storage().data_ptr()] = hook, name
        return inputs

    def _drop(self, drop: Any, module: nn.Module, output: Any):
        self._forget(module)
        return drop(module, output)

    def _forget(self, module: nn.Module) -> None:
        for weight in module.parameters():
            self._fetched.pop(weight.untyped_storage().data_ptr(), None)

    def _pack(self, tensor: Tensor):
        found = self._fetched.get(tensor.untyped_storage().data_ptr())
        if found is None:
            return tensor
        return *found, tensor.size(), tensor.stride(), tensor.storage_offset()

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        hook, name, *view = packed
        return hook.weights_map[name].to(hook.execution_device).as_strided(*view)
