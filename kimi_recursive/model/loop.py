"""The chunk loop: a base decoder, the cells around it, and the passes over one chunk.

Step 0 is the base model, untouched; it alone writes to the cache. Steps 1..K are further full-depth
passes over the current chunk, each from a fork of the cache at the chunk's start, with
`RefineCell`s hooked behind the decoder layers for the duration of the pass.

Shapes: B batch, P prefix length, W chunk length (at most `chunk_width`), D hidden size,
S state size, V vocabulary, K inner steps.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kimi_recursive.kimi.short_passes import ShortPasses
from kimi_recursive.model.cache import fork
from kimi_recursive.model.cells import BoundaryHead, LatentToken, RefineCell
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.model.placement import Refetching, execution_device, is_offloaded

if TYPE_CHECKING:
    from kimi_recursive.model.adapter import Adapter


def find_decoder_layers(base: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a Hugging Face decoder: its outermost list of `num_hidden_layers`.

    Raises:
        ValueError: there is no such list.
    """
    num_layers = base.config.get_text_config().num_hidden_layers
    found = [
        (name.count("."), module)
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    if not found:
        raise ValueError(f"{type(base).__name__}: found no ModuleList of {num_layers} layers")
    return min(found, key=lambda item: item[0])[1]


@dataclass
class ChunkState:
    """One chunk in the loop: what step t left behind for step t + 1.

    Attributes:
        prefix: Cache at the chunk's start; never written to.
        committed: Cache after the base has encoded the chunk.
        mask: Attention mask [B, P + W], or None when nothing is padded.
        step: Inner steps done.
        h_top: Output of the last decoder layer at this step [B, W, D].
        logits: Next-token logits at this step [B, W, V].
        states: Cell states by layer index, each [B, W, S].
    """

    prefix: Cache
    committed: Cache
    input_ids: Tensor
    mask: Tensor | None
    step: int
    h_top: Tensor
    logits: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)


class ChunkLoop(nn.Module):
    """A base decoder with the refinement loop in its path.

    Args:
        base: Any Hugging Face decoder with a language-model head.
        config: What to build; when left out, the legacy keyword arguments (any parameters of
            `RecursiveConfig`) make one with `recursive_enabled=True`.

    Attributes:
        base: The model as given; it keeps no hook between calls, and only an adapter modifies it.
        refine_cells: A `RefineCell` for each refined layer, or None when disabled.
        latent: `LatentToken`, or None when disabled or `use_latent_token` is False.
        boundary: `BoundaryHead`, or None when disabled.
        adapter: What was trained inside the base (`kimi_recursive.model.adapter`), or None.

    Raises:
        ValueError: invalid config, or layers that the base does not have.
    """

    def __init__(self, base: PreTrainedModel, config: RecursiveConfig | None = None, **legacy: Any):
        super().__init__()
        if config is None:
            config = RecursiveConfig.from_dict({"recursive_enabled": True, **legacy})
        elif legacy:
            raise ValueError(f"give a config or keyword arguments, not both: {sorted(legacy)}")
        self.config = config.validated()
        self.base = base
        self._layers = [find_decoder_layers(base)]  # in a list: not a submodule of the wrapper
        self._refetching = Refetching(base) if is_offloaded(base) else None
        self._accepted = set(inspect.signature(base.forward).parameters)
        self.refine_cells = self.latent = self.boundary = None
        self.adapter: Adapter | None = None
        self._active = config.recursive_enabled
        if not config.recursive_enabled:
            return
        d_model = base.config.get_text_config().hidden_size
        self.refined_layers = config.layer_indices(len(self.layers))
        self.refine_cells = nn.ModuleList(
            RefineCell(d_model, config.d_state) for _ in self.refined_layers
        )
        if config.use_latent_token:
            width = base.get_input_embeddings().weight.shape[1]
            if width != d_model:
                raise ValueError(
                    f"use_latent_token needs embeddings as wide as the hidden states, {width} is "
                    f"not {d_model}; set it to false for this base"
                )
            self.latent = LatentToken(d_model)
        self.boundary = BoundaryHead(d_model, config.gate_hidden, config.max_chunk_len)
        # A device_map may have spread the layers; what is not of a layer is where tokens go in.
        for index, cell in zip(self.refined_layers, self.refine_cells, strict=True):
            cell.to(execution_device(self.layers[index]))
        for module in (self.latent, self.boundary):
            if module is not None:
                module.to(self.device)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers of the base."""
        return self._layers[0]

    @property
    def device(self) -> torch.device:
        """Where tokens go in, and logits, top hidden states and losses come out."""
        return execution_device(self.base.get_input_embeddings())

    @property
    def active(self) -> bool:
        """Whether the loop runs: recursion is enabled and not inside `disabled()`."""
        return self._active

    def sidecar(self) -> list[nn.Module]:
        """The components around the base; empty when recursion is disabled."""
        return [m for m in (self.refine_cells, self.latent, self.boundary) if m is not None]

    def sidecar_state_dict(self) -> dict[str, Tensor]:
        """The weights of the sidecar alone."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("base.")}

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the cells. The base keeps its mode: the gates of some released models
        refuse training mode, and gradients flow through them in eval mode too."""
        self.training = mode
        for module in self.sidecar():
            module.train(mode)
        return self

    # ---- one chunk -------------------------------------------------------------------------

    def new_cache(self) -> Cache:
        """An empty cache for the base."""
        return DynamicCache(config=self.base.config)

    def run_base(
        self,
        cache: Cache,
        mask: Tensor | None,
        states: dict[int, Tensor] | None = None,
        **inputs: Any,
    ) -> tuple[Tensor, Tensor]:
        """One full-depth pass. With `states`, the cells refine the stream and update them.

        Returns: top hidden state [B, W, D] and logits [B, W, V].
        """
        captured: dict[str, Tensor] = {}

        def refine(cell: RefineCell, index: int):
            def hook(_layer, _args, output):
                h = output[0] if isinstance(output, tuple) else output
                h, states[index] = cell(h, states.get(index))
                return (h, *output[1:]) if isinstance(output, tuple) else h

            return hook

        def capture(_layer, _args, output):
            captured["h_top"] = output[0] if isinstance(output, tuple) else output

        handles = []
        try:
            if states is not None:
                for index, cell in zip(self.refined_layers, self.refine_cells, strict=True):
                    hook = refine(cell, index)
                    handles.append(self.layers[index].register_forward_hook(hook))
            handles.append(self.layers[-1].register_forward_hook(capture))
            if mask is not None:
                width = next(iter(inputs.values())).shape[1]
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
            inputs = {k: v for k, v in inputs.items() if k in self._accepted}
            with self._refetching.graph() if self._refetching else nullcontext():
                logits = self.base(
                    **inputs, attention_mask=mask, past_key_values=cache, use_cache=True
                ).logits
        finally:
            for handle in handles:
                handle.remove()
        return captured["h_top"].to(self.device), logits.to(self.device)

    def short_passes(self) -> ShortPasses | None:
        """A faster `run_base` for a few tokens, with a copy of the weights as they are now; None
        unless the base is a small KimiLinear on the CPU."""
        if not ShortPasses.serves(self.base):
            return None
        cells = dict(zip(self.refined_layers, self.refine_cells, strict=True))
        return ShortPasses(self.base, cells, self.run_base)

    def encode(self, input_ids: Tensor, cache: Cache, mask: Tensor | None = None) -> Cache:
        """The cache after the base has read `input_ids` [B, T]; `cache` itself is left as it is."""
        cache = fork(cache)
        if input_ids.shape[1]:
            self.run_base(cache, mask, input_ids=input_ids, logits_to_keep=1)
        return cache

    def start_chunk(
        self, input_ids: Tensor, prefix: Cache, mask: Tensor | None = None
    ) -> ChunkState:
        """Step 0: the base reads the chunk `input_ids` [B, W] after `prefix`.

        Raises:
            ValueError: the chunk is empty or longer than `chunk_width`.
        """
        if not 1 <= input_ids.shape[1] <= self.config.chunk_width:
            raise ValueError(
                f"a chunk has 1 to chunk_width = {self.config.chunk_width} tokens, "
                f"got {input_ids.shape[1]}"
            )
        committed = fork(prefix)
        h_top, logits = self.run_base(committed, mask, input_ids=input_ids)
        return ChunkState(prefix, committed, input_ids, mask, 0, h_top, logits)

    def refine(self, chunk: ChunkState, input_ids: Tensor | None = None) -> ChunkState:
        """Step t + 1 of a chunk: a full-depth pass that ends in a new `ChunkState`.

        Args:
            input_ids: The chunk's tokens [B, W] where they were edited since the step before.
        """
        ids = chunk.input_ids if input_ids is None else input_ids
        embeds, states = self.next_inputs(ids, chunk.h_top), self.next_states(chunk.states)
        h_top, logits = self.run_base(fork(chunk.prefix), chunk.mask, states, inputs_embeds=embeds)
        return ChunkState(
            chunk.prefix, chunk.committed, ids, chunk.mask, chunk.step + 1, h_top, logits, states
        )

    def next_inputs(self, input_ids: Tensor, h_top: Tensor) -> Tensor:
        """What the next step reads [B, W, D], from the tokens [B, W] and the step before."""
        embeds = self.base.get_input_embeddings()(input_ids)
        if self.latent is None:
            return embeds
        return self.latent(embeds, torch.zeros_like(h_top) if self.config.single_pass else h_top)

    def next_states(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        """The cell states that the next step starts from: a copy that it may update."""
        return {} if self.config.single_pass else dict(states)

    def steps(self, chunk: ChunkState, num_steps: int | None = None) -> Iterator[ChunkState]:
        """The chunk at steps 0..`num_steps`, K by default; only step 0 when not active."""
        yield chunk
        for _ in range(self.resolve_steps(num_steps)):
            chunk = self.refine(chunk)
            yield chunk

    def last_step(self, chunk: ChunkState, num_steps: int | None = None) -> ChunkState:
        """The last of `steps`."""
        return deque(self.steps(chunk, num_steps), maxlen=1).pop()

    def resolve_steps(self, num_steps: int | None) -> int:
        """The number of inner steps to run. More than `max_inner_steps` is allowed.

        Raises:
            ValueError: a negative number.
        """
        if num_steps is not None and num_steps < 0:
            raise ValueError(f"num_steps must be at least 0, got {num_steps}")
        if not self.active:
            return 0
        return self.config.max_inner_steps if num_steps is None else num_steps

    def chunks(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, chunk_start: int = 0
    ) -> Iterator[ChunkState]:
        """Step 0 of each chunk of `input_ids` [B, T] on the grid chunk_start + n * chunk_width."""
        prefix_mask = None if attention_mask is None else attention_mask[:, :chunk_start]
        prefix = self.encode(input_ids[:, :chunk_start], self.new_cache(), prefix_mask)
        for start in range(chunk_start, input_ids.shape[1], self.config.chunk_width):
            stop = min(start + self.config.chunk_width, input_ids.shape[1])
            mask = None if attention_mask is None else attention_mask[:, :stop]
            chunk = self.start_chunk(input_ids[:, start:stop], prefix, mask)
            yield chunk
            prefix = chunk.committed
