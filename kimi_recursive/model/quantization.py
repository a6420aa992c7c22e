"""Bases in 8 or 4 bits, in transformers' own formats.

8 bits are torchao's: weights alone, with a scale for each row. 4 bits are bitsandbytes' NF4 with
nested scales (Dettmers et al., 2023, arXiv 2305.14314). Embeddings, head, norms, routers and
convolutions stay as they are, and gradients flow through the quantised weights.

A quantised base is a checkpoint like any other. Only the experts of a Kimi-Linear need care:
transformers holds those of a layer in two parameters of three dimensions, which neither library
quantises. `ExpertModules` holds them as linear modules.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PretrainedConfig,
    TorchAoConfig,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearExperts
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION
from transformers.utils.quantization_config import QuantizationMethod

from kimi_recursive.doors import missing_extra

LIBRARIES = {"8bit": "torchao", "4bit": "bitsandbytes"}
# Bytes of a weight, its scales included: of NF4 one byte for 64 weights and 4 for 16,384.
BYTES = {"8bit": 1.0, "4bit": 0.5 + 1 / 64 + 4 / 16384}
EXPERT_MODULES = "expert_modules"  # key in the config.json of a base whose experts are modules


class ExpertModules(nn.Module):
    """The routed experts of a layer, a linear module for each product.

    Args:
        config: Of the decoder.
        experts: Where the weights come from; by default they are new, to be loaded.
    """

    def __init__(self, config: PretrainedConfig, experts: KimiLinearExperts | None = None):
        super().__init__()
        experts = experts or KimiLinearExperts(cast("Any", config))
        self.act_fn: Any = experts.act_fn
        self.gate_up_proj = _modules(experts.gate_up_proj)
        self.down_proj = _modules(experts.down_proj)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the experts chosen for each token.

        Args:
            hidden: [T, D].
            chosen: Indices of experts [T, k], int64.
            weights: [T, k].

        Returns: [T, D].
        """
        total = torch.zeros_like(hidden)
        for expert in chosen.unique().tolist():
            token, place = torch.where(chosen == expert)
            gate, up = self.gate_up_proj[expert](hidden[token]).chunk(2, dim=-1)
            output = self.down_proj[expert](self.act_fn(gate) * up)
            output = output * weights[token, place, None]
            total.index_add_(0, token, output.to(total.dtype))
        return total


def _modules(weights: Any) -> nn.ModuleList:
    """A linear module for each matrix of [E, N, M], on its memory."""
    modules: list[nn.Module] = []
    for matrix in weights.detach():
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(matrix, requires_grad=False)
        modules.append(linear)
    return nn.ModuleList(modules)


def quantization_of(base: nn.Module) -> str | None:
    """The library that a base is quantised by, or None."""
    method = getattr(base, "quantization_method", None)
    return None if method is None else str(getattr(method, "value", method))


@contextmanager
def loading(config: Mapping[str, Any], where: str) -> Iterator[None]:
    """Inside the block transformers can load a base that `save_quantized` wrote.

    Args:
        config: The config.json of any base.
        where: The base, in messages.

    Raises:
        ValueError: the base is quantised, and its library is missing.
    """
    if "quantization_config" not in config:
        yield
        return
    methods = [QuantizationMethod.TORCHAO, QuantizationMethod.BITS_AND_BYTES]
    patch = {"module_name": ExpertModules, "quantization_methods": methods}
    patched = {KimiLinearExperts.__name__: patch} if config.get(EXPERT_MODULES) else {}
    with (
        missing_extra("quantized", f"{where}: a quantised base"),
        mock.patch.dict(MODULES_TO_PATCH_FOR_QUANTIZATION, patched),
    ):
        yield


def check_quantized(base: nn.Module, where: str) -> None:
    """See that this CPU reads the 4-bit weights of a base right, and go on reading them as they
    are: where it has products in bfloat16, bitsandbytes would pack them anew at the first
    inference, in place and for activations in bfloat16, which training does not have.

    Raises:
        ValueError: a row is not a multiple of the 64 numbers that share a scale, and bitsandbytes
            reads such rows wrong here (0.50 does so on CPUs with AVX-512).
    """
    linear: Any
    for name, linear in base.named_modules():
        if hasattr(linear, "support_avx512bf16_for_cpu"):
            linear.support_avx512bf16_for_cpu = False
            if (state := getattr(linear.weight, "quant_state", None)) is None:
                continue  # not in 4 bits: a part that transformers left as it is
            on_cpu = linear.weight.device.type == "cpu"
            row, block = state.shape[-1], state.blocksize
            if on_cpu and row % block and not _reads_any_row():
                raise ValueError(
                    f"{where}: the rows of {name} have {row} numbers, and bitsandbytes reads only "
                    f"multiples of {block} right in 4 bits on this CPU; base.quantization: 8bit, "
                    "or a GPU"
                )


@cache
def _reads_any_row() -> bool:
    """Whether 4 bits of rows of 96 numbers are, to rounding, these numbers."""
    library: Any = import_module("bitsandbytes.functional")
    weight = torch.linspace(-1, 1, 2 * 96).view(2, 96)
    found = library.dequantize_4bit(*library.quantize_4bit(weight, quant_type="nf4"))
    return bool((found - weight).abs().max() < 0.2)


def quantized_weights(base: nn.Module, bits: str) -> list[nn.Parameter]:
    """The weights of an unquantised base that `save_quantized` quantises."""
    kinds = ("Linear",) if bits == "8bit" else ("Linear", "Conv1D")  # the latter of GPT-2
    head = cast("Any", base).get_output_embeddings()
    found: list[nn.Parameter] = []
    for module in base.modules():
        if type(module).__name__ in kinds and module is not head:
            found.append(cast("nn.Parameter", module.weight))
        elif isinstance(module, KimiLinearExperts):
            found.extend(module.parameters())
    return found


def save_quantized(
    source: str | Path,
    folder: str | Path,
    bits: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> None:
    """Quantise a base on the CPU and save it. The base must fit in memory as it is.

    Args:
        source: A base in a local folder.
        folder: Where the quantised base goes, without a tokenizer.
        bits: `8bit` or `4bit`.
        dtype: Of what is not quantised, and of the products.
        trust_remote_code: Run code that comes with the checkpoint, if transformers has no class for
            the model.

    Raises:
        ValueError: the library is missing, or the base is quantised already.
    """
    with missing_extra("quantized", f"base.quantization: {bits}"):
        import_module(LIBRARIES[bits])
    known = PretrainedConfig.get_config_dict(str(source))[0].get("model_type") in CONFIG_MAPPING
    code = {"trust_remote_code": trust_remote_code and not known}
    shape = AutoConfig.from_pretrained(str(source), **code)
    if getattr(shape, "quantization_config", None) is not None:
        raise ValueError(f"base.quantization: {source} is quantised already")
    found: Any = shape.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    if bits == "8bit":
        config: Any = TorchAoConfig(_torchao().Int8WeightOnlyConfig())
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=found,
        )
    model = AutoModelForCausalLM.from_pretrained(
        str(source), dtype=found, device_map="cpu", quantization_config=config, **code
    )
    for name, module in list(model.named_modules()):
        if isinstance(module, KimiLinearExperts):
            experts = ExpertModules(model.config, module)
            for products in (experts.gate_up_proj, experts.down_proj):
                _quantize(products, bits, found)
            model.set_submodule(name, experts)
            setattr(model.config, EXPERT_MODULES, True)
    model.save_pretrained(folder, save_original_format=False)


def _torchao() -> Any:
    return import_module("torchao.quantization")


def _quantize(products: nn.ModuleList, bits: str, dtype: torch.dtype) -> None:
    if bits == "8bit":
        _torchao().quantize_(products, _torchao().Int8WeightOnlyConfig())
        return
    library: Any = import_module("bitsandbytes.nn")
    options = {"compress_statistics": True, "quant_type": "nf4"}
    for i, linear in enumerate(products):
        weight = cast("Tensor", linear.weight).detach()
        size = weight.shape[1], weight.shape[0]
        new = library.Linear4bit(*size, False, dtype, device="meta", **options)
        new.weight = library.Params4bit(weight, requires_grad=False, module=new, **options)
        products[i] = new.to("cpu")
