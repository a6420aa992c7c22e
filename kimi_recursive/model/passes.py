"""How generation runs the base: passes of a few tokens.

Of 2 to 8 rows, `W x^T` is the faster product: MKL on AMD's Zen takes for `x W^T` of 4 rows 1.1 to
2.8 times as long. No weight is copied.

Shapes: B batch, T new tokens, M rows of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

Run = Callable[..., tuple[Tensor, Tensor]]  # as `ChunkLoop.run_base`
ROWS = range(2, 9)  # of a product; beyond them the plain one is as fast


@dataclass(frozen=True)
class Passes:
    """How generation runs the base.

    Attributes:
        run: `ChunkLoop.run_base`, or a faster form of it with a copy of the present weights.
        max_tokens: The most tokens of a pass that `run` is fast for.
        takes_back: Whether tokens of a pass can be taken out of a recorded cache (`cache.unread`).
    """

    run: Run
    max_tokens: int
    takes_back: bool


class FewRows:
    """Passes of a float32 base on the CPU, with fast products of a few rows."""

    def __init__(self, base: PreTrainedModel, cells: Iterable[nn.Module], run: Run):
        """
        Args:
            base: A decoder that `serves` accepts.
            cells: The other modules that a pass calls.
            run: As `ChunkLoop.run_base`.
        """
        assert self.serves(base)
        modules = chain.from_iterable(module.modules() for module in (base, *cells))
        self.run_plain = run
        self.forwards = [
            (module.__dict__, partial(few_rows, module))
            for module in modules
            if type(module) is nn.Linear and "forward" not in module.__dict__
        ]

    @staticmethod
    def serves(base: PreTrainedModel) -> bool:
        """Whether the base is in float32 on the CPU."""
        return base.device.type == "cpu" and base.dtype == torch.float32

    def run(self, cache: Cache, mask: Tensor | None, *args: Any, **inputs: Any) -> Any:
        """As `ChunkLoop.run_base`."""
        x = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        if x.shape[0] * x.shape[1] not in ROWS:
            return self.run_plain(cache, mask, *args, **inputs)
        with self._fast_products():
            return self.run_plain(cache, mask, *args, **inputs)

    @contextmanager
    def _fast_products(self) -> Iterator[None]:
        for attributes, forward in self.forwards:
            attributes["forward"] = forward
        try:
            yield
        finally:
            for attributes, _ in self.forwards:
                del attributes["forward"]


def few_rows(linear: nn.Linear, x: Tensor) -> Tensor:
    """`linear(x)` for x [..., in] with a few rows M."""
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    if len(rows) not in ROWS or rows.dtype != linear.weight.dtype:
        return F.linear(x, linear.weight, linear.bias)
    # Contiguous: what follows reads row by row, and would copy it otherwise.
    out = (linear.weight @ rows.t()).t().contiguous()
    if (bias := cast("Tensor | None", linear.bias)) is not None:
        out += bias
    return out.view(*x.shape[:-1], -1)
