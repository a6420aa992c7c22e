"""What phases B and C train inside the base: LoRA on its top layers, and whole layers.

On disk, beside the sidecar: `adapter/` in peft's own format (`PeftModel.from_pretrained` loads it),
and `layers.safetensors`, the weights of the unfrozen layers under the names of the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import (
    cast_adapter_dtype,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kimi_recursive.model.placement import describe, is_offloaded
from kimi_recursive.model.quantization import ExpertModules
from kimi_recursive.model.weights import misfit, read_weights

ADAPTER_DIR = "adapter"
WEIGHTS_NAME = "adapter_model.safetensors"
LAYERS_NAME = "layers.safetensors"
PEFT_PREFIX = "base_model.model."  # what PeftModel calls the model that it wraps
NAME = "default"  # peft's name for the only adapter of a model


class Adapter:
    """The trained changes inside a base. They are made to the base in place.

    Args:
        base: The decoder.
        layers: Its decoder layers.

    Attributes:
        lora: The configuration of the LoRA modules, or None.
        layers: Indices of the unfrozen decoder layers.
        pretrained: The weights that these layers had, by name, on the CPU.

    Raises:
        ValueError: weights of the base are offloaded.
    """

    def __init__(self, base: PreTrainedModel, layers: nn.ModuleList):
        if is_offloaded(base):
            raise ValueError(
                "device_map: a model of phase b or c changes the weights of its base, so no part "
                f"of the base may be offloaded to the CPU or the disk; now: {describe(base)}"
            )
        self.base = base
        self.decoder_layers = layers
        self.lora: LoraConfig | None = None
        self.layers: list[int] = []
        self.pretrained: dict[str, Tensor] = {}

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """The LoRA matrices, by their name in the base."""
        return {n: p for n, p in self.base.named_parameters() if ".lora_" in n}

    def layer_parameters(self) -> dict[str, nn.Parameter]:
        """The weights of the unfrozen layers, by their name in the pretrained base."""
        chosen = {id(p) for i in self.layers for p in self.decoder_layers[i].parameters()}
        return {
            name.replace(".base_layer.", "."): p
            for name, p in self.base.named_parameters()
            if id(p) in chosen and ".lora_" not in name
        }

    def add_lora(self, config: LoraConfig, seed: int) -> None:
        """Put LoRA modules into the base (Hu et al., 2021, arXiv 2106.09685), in float32.

        They change no output before they are trained.

        Args:
            seed: Decides their random factor.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, self.base, NAME)
        cast_adapter_dtype(self.base, NAME)
        self.lora = config

    def set_lora(self, config: LoraConfig, seed: int) -> None:
        """Add LoRA, unless the base has the same LoRA already.

        Raises:
            ValueError: the base has LoRA of another rank, scale or targets.
        """
        if self.lora is None:
            self.add_lora(config, seed)
            return
        for key in ("r", "lora_alpha", "target_modules"):
            here, asked = getattr(self.lora, key), getattr(config, key)
            if here != asked:
                raise ValueError(f"lora: this model was trained with {key} {here}, not {asked}")

    def set_layers(self, layers: Sequence[int]) -> None:
        """Unfreeze these decoder layers, unless they are unfrozen already.

        Raises:
            ValueError: other layers are unfrozen.
        """
        if self.layers and self.layers != sorted(layers):
            raise ValueError(
                f"unfreeze_every: this model was trained with layers {self.layers} unfrozen, "
                f"not {sorted(layers)}"
            )
        if not self.layers:
            self.unfreeze(layers)

    def unfreeze(self, layers: Sequence[int]) -> None:
        """Let whole decoder layers train, and keep a copy of their weights in `pretrained`."""
        self.layers = sorted(layers)
        for name, parameter in self.layer_parameters().items():
            self.pretrained[name] = parameter.detach().to("cpu", copy=True)

    @torch.no_grad()
    def drop(self) -> None:
        """Give the base its pretrained weights and modules back, bit for bit."""
        for name, parameter in self.layer_parameters().items():
            parameter.copy_(self.pretrained[name])
        for name, module in list(self.base.named_modules()):
            if isinstance(module, BaseTunerLayer):
                self.base.set_submodule(name, cast("Any", module).base_layer)
        vars(self.base).pop("peft_config", None)
        self.lora, self.layers, self.pretrained = None, [], {}

    def save(self, directory: Path) -> None:
        """Write LoRA and unfrozen layers into the folder of a sidecar."""
        if self.lora is not None:
            folder = directory / ADAPTER_DIR
            ordered = copy(self.lora)  # peft keeps a set, and equal adapters must be equal files
            ordered.target_modules = sorted(self.lora.target_modules or ())
            ordered.save_pretrained(str(folder))
            state = get_peft_model_state_dict(self.base, adapter_name=NAME)
            _save({PEFT_PREFIX + name: t for name, t in state.items()}, folder / WEIGHTS_NAME)
        if self.layers:
            _save(self.layer_parameters(), directory / LAYERS_NAME)

    @torch.no_grad()
    def load_weights(self, directory: Path) -> None:
        """Load the weights that `save` wrote. LoRA modules and layers must be set before.

        Raises:
            ValueError: a file is missing or damaged, a name or shape differs, or a weight is not
                finite.
        """
        if self.lora is not None:
            path = directory / ADAPTER_DIR / WEIGHTS_NAME
            have = get_peft_model_state_dict(self.base, adapter_name=NAME)
            tensors = _read(path, {PEFT_PREFIX + name: t for name, t in have.items()})
            set_peft_model_state_dict(
                self.base,
                {name.removeprefix(PEFT_PREFIX): t for name, t in tensors.items()},
                adapter_name=NAME,
            )
        if self.layers:
            parameters = self.layer_parameters()
            for name, tensor in _read(directory / LAYERS_NAME, parameters).items():
                parameters[name].copy_(tensor)


def lora_config(
    base: PreTrainedModel,
    layers: nn.ModuleList,
    rank: int,
    alpha: float,
    targets: str | Sequence[str],
) -> LoraConfig:
    """LoRA on linear modules of the top third (rounded up) of the decoder layers.

    Args:
        base: The decoder.
        layers: All of its decoder layers.
        rank, alpha: Of the LoRA matrices; their product is scaled by alpha / rank.
        targets: `all-linear`, or the last parts of module names such as `q_proj`.

    Raises:
        ValueError: these layers have no module of such a name.
    """
    num_layers = len(layers)
    first = num_layers - math.ceil(num_layers / 3)
    inside = {id(m) for layer in layers[first:] for m in layer.modules()}
    experts = [m for m in base.modules() if isinstance(m, ExpertModules)]
    inside -= {id(part) for m in experts for part in m.modules()}  # as of a base that is whole
    modules = {n: m for n, m in base.named_modules() if id(m) in inside}
    wrapped = tuple(f"{n}." for n, m in modules.items() if isinstance(m, BaseTunerLayer))
    linear = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D | BaseTunerLayer) and not name.startswith(wrapped)
    ]
    there = {name.rsplit(".", 1)[-1] for name in linear}
    if targets != "all-linear":
        if unknown := sorted(set(targets) - there):
            raise ValueError(
                f"lora.targets: layers {first} to {num_layers - 1} have no linear module "
                f"{', '.join(unknown)}; there are {', '.join(sorted(there))}"
            )
        there = set(targets)
    return LoraConfig(
        r=rank,
        lora_alpha=cast("Any", alpha),  # peft takes fractions too
        target_modules=sorted(name for name in linear if name.rsplit(".", 1)[-1] in there),
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.modules()),
    )


def every_nth_layer(num_layers: int, every: int) -> list[int]:
    """Indices of every `every`-th decoder layer: every - 1, 2 * every - 1, ...

    Raises:
        ValueError: the base has fewer than `every` layers.
    """
    if every > num_layers:
        raise ValueError(f"unfreeze_every is {every}, but the base has {num_layers} layers")
    return list(range(every - 1, num_layers, every))


def load_adapter(
    directory: Path,
    adapter: Adapter | None,
    base: PreTrainedModel,
    layers: nn.ModuleList,
    unfrozen: Sequence[int],
    lora: bool,
) -> Adapter:
    """Load the adapter saved in `directory` into a base.

    Args:
        directory: The folder of a sidecar.
        adapter: The adapter that the base has already, or None.
        base: The decoder.
        layers: Its decoder layers.
        unfrozen: Indices of the layers that the saved adapter trained whole.
        lora: Whether the saved adapter has LoRA.

    Raises:
        ValueError: as in `Adapter.load_weights`, or the base has an adapter of another kind.
    """
    if adapter is None:
        adapter = Adapter(base, layers)
        adapter.unfreeze(unfrozen)
        folder = directory / ADAPTER_DIR
        if lora:
            try:
                config = cast("LoraConfig", LoraConfig.from_pretrained(str(folder)))
                adapter.add_lora(config, seed=0)
            except (OSError, ValueError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(
                    f"{folder}: not a LoRA adapter for this base ({reason})"
                ) from error
    if (adapter.lora is not None, adapter.layers) != (lora, sorted(unfrozen)):
        raise ValueError(
            f"{directory}: its adapter differs from the one in this wrapper; "
            "call drop_adapter() first"
        )
    adapter.load_weights(directory)
    return adapter


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, path)


def _read(path: Path, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = read_weights(path)
    if problem := misfit(tensors, expected):
        raise ValueError(f"{path}: does not fit this base: {problem}")
    return tensors
