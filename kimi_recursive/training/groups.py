"""What trains in a phase: parameter groups, and their optimizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import nn

from kimi_recursive.doors import missing_extra
from kimi_recursive.model.quantization import quantization_of
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.training.settings import PhaseSettings

Groups = dict[str, dict[str, nn.Parameter]]
MIN_8BIT = 4096  # numbers that a parameter must have for a state in 8 bits


def parameter_groups(
    wrapper: ChunkRefineWrapper, phase: str, settings: PhaseSettings, seed: int
) -> Groups:
    """Put into the base what the phase adds, and mark what trains.

    Returns: the parameters that train, by group (`sidecar`, `heads`, `feedback`, `lora`,
        `layers`) and name. Without inner steps the cells stay as they are.

    Raises:
        ValueError: LoRA targets or layers that the base does not have, or a base below float32
            whose own weights would train.
    """
    groups: Groups = {"sidecar": {}, "heads": {}} if wrapper.active else {}
    if wrapper.reads_logits:  # A single pass leaves the feedback as it is.
        groups["feedback"] = {}
    home = {"base": None, "boundary": "heads", "halting": "heads", "feedback": "feedback"}
    for name, parameter in wrapper.named_parameters():
        group = home.get(name.partition(".")[0], "sidecar")
        if group in groups:
            groups[group][name] = parameter
    if phase != "a":
        from kimi_recursive.model.adapter import Adapter, every_nth_layer, lora_config

        adapter = wrapper.adapter = wrapper.adapter or Adapter(wrapper.base, wrapper.layers)
        if phase == "b":
            assert settings.lora is not None, "phase b has LoRA"
            config = lora_config(wrapper.base, wrapper.layers, **asdict(settings.lora))
            adapter.set_lora(config, seed)
        if phase == "c":
            if library := quantization_of(wrapper.base):
                raise ValueError(
                    "phase c trains weights of the base, and whole numbers of few bits have no "
                    f"gradient; this base is quantised by {library}: use one that is not"
                )
            if wrapper.base.dtype != torch.float32:
                raise ValueError(
                    "phase c trains weights of the base, and their updates are lost below "
                    f"float32; this base is {wrapper.base.dtype}: set its dtype to float32"
                )
            assert settings.unfreeze_every is not None, "phase c unfreezes layers"
            adapter.set_layers(every_nth_layer(len(wrapper.layers), settings.unfreeze_every))
        groups["lora"] = adapter.lora_parameters()
        if adapter.layers:
            groups["layers"] = adapter.layer_parameters()
    wrapper.requires_grad_(False)
    for members in groups.values():
        for parameter in members.values():
            parameter.requires_grad_(True)
    return groups


def optimizer_bytes(parameters: Iterable[nn.Parameter], settings: PhaseSettings) -> int:
    """The bytes of an optimizer's state: two numbers for each trained one."""
    if settings.optimizer != "adamw_8bit":
        return sum(2 * p.numel() * p.element_size() for p in parameters)
    # In blocks of 256 with a scale of 4 bytes; small ones stay in float32.
    return sum(
        round(p.numel() * 2 * (1 + 4 / 256)) if p.numel() >= MIN_8BIT else 8 * p.numel()
        for p in parameters
    )


def group_optimizer(groups: Groups, settings: PhaseSettings) -> torch.optim.Optimizer:
    """AdamW with a peak learning rate for each group; with its state in 8 bits that of bitsandbytes
    (Dettmers et al., 2022, arXiv 2110.02861).

    Raises:
        ValueError: bitsandbytes is missing.
    """
    rates = {
        "sidecar": settings.lr,
        "heads": settings.lr_heads,
        "feedback": settings.lr_feedback,
        "lora": settings.lr_lora,
        "layers": settings.lr_layers,
    }
    make: Any = partial(torch.optim.AdamW, fused=True)
    if settings.optimizer == "adamw_8bit":
        with missing_extra("quantized", "optimizer: adamw_8bit"):
            library = import_module("bitsandbytes.optim")
        make = partial(library.AdamW8bit, min_8bit_size=MIN_8BIT)
    return make(
        [
            {"params": list(members.values()), "name": group, "lr": rates[group]}
            for group, members in groups.items()
        ],
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
