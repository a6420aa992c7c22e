"""FLOPs, counted by torch on real passes: matrix products, convolutions and attention."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers.integrations import moe  # noqa: F401, registers torch.ops.transformers

from kimi_recursive.model.wrapper import ChunkRefineWrapper


@functools.cache
def _formulas() -> Mapping[Any, Callable[..., int]]:
    """Torch's formula of each operator, and those of the grouped product of experts, which torch
    does not count: 2 a multiply-add."""

    def grouped(a, b, *_args, **_kwargs) -> int:
        return 2 * math.prod(a) * b[-1]

    def grouped_backward(a, b, *_args, **_kwargs) -> int:
        return 2 * grouped(a, b)

    ops = torch.ops.transformers
    formulas = {
        torch.ops.aten._grouped_mm: grouped,
        ops.grouped_mm_fallback: grouped,
        ops.grouped_mm_fallback_backward: grouped_backward,
    }
    return FlopCounterMode(display=False, custom_mapping=formulas).flop_registry


@functools.cache
def _rule(operator: Any) -> tuple[bool, Callable[..., int] | None]:
    """Whether an operator is made of others, which are counted in its place, and its formula."""
    decomposes = operator is not torch.ops.prim.device.default and operator._can_decompose()
    formula = _formulas().get(operator._overloadpacket)
    return decomposes, _of_shapes(formula) if hasattr(formula, "__wrapped__") else formula


def _of_shapes(formula: Any) -> Callable[..., int]:
    """A formula that reads shapes alone, without torch's search for tensors inside arguments."""
    of_shapes = formula.__wrapped__

    def shape(value: Any) -> Any:
        return value.shape if isinstance(value, torch.Tensor) else value

    def count(*args: Any, out_val: Any, **kwargs: Any) -> int:
        named = {name: shape(value) for name, value in kwargs.items()}
        return of_shapes(*map(shape, args), out_shape=shape(out_val), **named)

    return count


class FlopCounter(TorchDispatchMode):
    """Counts the FLOPs of what runs inside the block as torch's `FlopCounterMode` does, but not by
    module, which takes torch most of the time of a small model.

    Attributes:
        total: The FLOPs so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and the guard takes a fifth of the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        decomposes, formula = _rule(func)
        if decomposes:
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


def count_flops(call: Callable[[], Any]) -> int:
    """FLOPs of what `call` runs, 2 for each multiply-add; elementwise work is not counted."""
    with FlopCounter() as counter:
        call()
    return counter.total


@torch.no_grad()
def forward_flops_per_token(wrapper: ChunkRefineWrapper, input_ids: torch.Tensor) -> float:
    """FLOPs per token of the logits that are scored: of all passes over each chunk up to step K.

    For a single-pass arm that is the one pass through the cells; the base's own pass, which only
    makes the states that later chunks attend to, is left out, in the arm's favour.

    Args:
        input_ids: [B, T], cut on the chunk grid.
    """

    def refine_all() -> None:
        for chunk in wrapper.chunks(input_ids):
            wrapper.last_step(chunk)

    flops = count_flops(refine_all)
    if wrapper.active and wrapper.config.single_pass:
        flops -= count_flops(lambda: list(wrapper.chunks(input_ids)))
    return flops / input_ids.numel()
