"""How generation runs the base: passes of a few tokens.

On AMD's Zen, MKL reads the weights of `x W^T` slowly when x has few rows. `W x^T` of 2 to 4 rows is
faster, and of a single row as two; from 3 rows on, weights in the layout of oneDNN are. They are a
second copy of all weights, made once a generation has shown that it is long.

Shapes: B batch, T new tokens, M rows of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

Run = Callable[..., tuple[Tensor, Tensor]]  # as `ChunkLoop.run_base`
MAX_ROWS = 64  # of a product; measured up to 32
TRANSPOSED_ROWS = 4  # up to which `W x^T` is faster than `x W^T`
PACKED_ROWS = 3  # from which packed weights are faster than the others
# Packing takes the time that about as many passes save.
PASSES_BEFORE_PACKING = 12


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
        self.linears = [
            _Linear(module)
            for module in modules
            if type(module) is nn.Linear
            and module.weight.dtype == torch.float32
            and "forward" not in module.__dict__
        ]
        self.num_passes = 0  # that packed weights had been faster for

    @staticmethod
    def serves(base: PreTrainedModel) -> bool:
        """Whether the base is in float32 on the CPU."""
        return base.device.type == "cpu" and base.dtype == torch.float32

    def run(self, cache: Cache, mask: Tensor | None, *args: Any, **inputs: Any) -> Any:
        """As `ChunkLoop.run_base`."""
        x = inputs["input_ids"] if "input_ids" in inputs else inputs["inputs_embeds"]
        num_rows = x.shape[0] * x.shape[1]
        if num_rows > MAX_ROWS:
            return self.run_plain(cache, mask, *args, **inputs)
        self.num_passes += num_rows >= PACKED_ROWS
        if self.num_passes == PASSES_BEFORE_PACKING and torch.backends.mkldnn.is_available():
            for linear in self.linears:
                linear.pack()
        with self._fast_products():
            return self.run_plain(cache, mask, *args, **inputs)

    @contextmanager
    def _fast_products(self) -> Iterator[None]:
        for linear in self.linears:
            linear.module.__dict__["forward"] = linear.forward
        try:
            yield
        finally:
            for linear in self.linears:
                del linear.module.__dict__["forward"]


class _Linear:
    """The product of a linear layer with a few rows."""

    def __init__(self, module: nn.Linear):
        self.module = module
        self.packed: Tensor | None = None

    def pack(self) -> None:
        """Copy the weight into the layout of oneDNN."""
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.module.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        """As that of the module, x [..., in]."""
        weight, bias = self.module.weight, cast("Tensor | None", self.module.bias)
        num_rows = x.numel() // x.shape[-1]
        if x.dtype != weight.dtype or not num_rows:  # autocast; an expert without rows
            return F.linear(x, weight, bias)
        if self.packed is not None and num_rows >= PACKED_ROWS:
            op = torch.ops.mkldnn._linear_pointwise
            return op(x, self.packed, bias, "none", [], "")
        if num_rows > TRANSPOSED_ROWS:
            return F.linear(x, weight, bias)
        rows = x.reshape(num_rows, -1).contiguous()
        if num_rows == 1:
            rows = rows.expand(2, -1).contiguous()
        # Contiguous: what follows reads row by row, and would copy it otherwise.
        out = (weight @ rows.t()).t()[:num_rows].contiguous()
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], -1)
