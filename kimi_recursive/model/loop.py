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
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kimi_recursive.kimi.short_passes import MAX_TOKENS, ShortPasses
from kimi_recursive.model.cache import fork, takes_back
from kimi_recursive.model.cells import (
    BoundaryHead,
    HaltingHead,
    LatentToken,
    RefineCell,
    TokenFeedback,
)
from kimi_recursive.model.checks import check_embeddings, find_decoder_layers
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.model.halting import Halting, next_halting
from kimi_recursive.model.passes import FewRows, Passes
from kimi_recursive.model.placement import Refetching, execution_device, is_offloaded

if TYPE_CHECKING:
    from kimi_recursive.model.adapter import Adapter


@dataclass
class ChunkState:
    """One chunk after step t: all that step t + 1 needs.

    Attributes:
        prefix: Cache at the chunk's start; never written to.
        committed: Cache after the base has encoded the chunk.
        mask: Attention mask [B, P + W], or None when nothing is padded.
        step: Inner steps done.
        h_top: Output of the last decoder layer at this step [B, W, D].
        logits: Next-token logits at this step [B, W, V].
        states: Cell states by layer index, each [B, W, S].
        halting: Which positions have stopped; None at step 0, and where none stops early.
    """

    prefix: Cache
    committed: Cache
    input_ids: Tensor
    mask: Tensor | None
    step: int
    h_top: Tensor
    logits: Tensor
    states: dict[int, Tensor] = field(default_factory=dict)
    halting: Halting | None = None

    @property
    def output(self) -> Tensor:
        """What the model says after at most `step` inner steps [B, W, V]: where a position has
        stopped, its logits of then. Later steps read `logits`, which go on."""
        return self.logits if self.halting is None else self.halting.output


class ChunkLoop(nn.Module):
    """A base decoder with the refinement loop around it.

    Args:
        base: Any Hugging Face decoder with a language-model head.
        config: What to build; when left out, the legacy keyword arguments (any parameters of
            `RecursiveConfig`) make one with `recursive_enabled=True`.

    Attributes:
        base: The model as given. It has no hook between calls; only an adapter changes it.
        refined_layers: Layers with a refinement cell, ascending; empty when disabled.
        refine_cells: A `RefineCell` for each refined layer, or None when disabled.
        latent: `LatentToken`, or None when disabled or `use_latent_token` is False.
        feedback: `TokenFeedback`, or None when disabled or `use_token_feedback` is False. A single
            pass has no step before, and does not use it.
        boundary: `BoundaryHead`, or None when disabled or where every token stops on its own.
        halting: `HaltingHead`, which is there when `boundary` is not.
        adapter: The trained changes inside the base (`kimi_recursive.model.adapter`), or None.
        phase, revision: The phase that trained the cells, and the revision of a base from the Hub,
            as the sidecar says that was loaded last; else None.

    Raises:
        ValueError: invalid config, layers that the base does not have, or a path from step to step
            that its embeddings do not allow.
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
        # transformers 5.24 renamed the argument for some models.
        self._cache_argument = "cache" if "cache" in self._accepted else "past_key_values"
        self.refined_layers: list[int] = []
        self.refine_cells: nn.ModuleList | None = None
        self.latent: LatentToken | None = None
        self.feedback: TokenFeedback | None = None
        self.boundary: BoundaryHead | None = None
        self.halting: HaltingHead | None = None
        self.adapter: Adapter | None = None
        self.phase: str | None = None
        self.revision: str | None = None
        self._active = config.recursive_enabled and config.max_inner_steps > 0
        if not config.recursive_enabled:
            return
        d_model = base.config.get_text_config().hidden_size
        self.refined_layers = config.layer_indices(len(self.layers))
        self.refine_cells = nn.ModuleList(
            RefineCell(d_model, config.d_state) for _ in self.refined_layers
        )
        check_embeddings(base, config, d_model)
        if config.use_latent_token:
            self.latent = LatentToken(d_model)
        if config.use_token_feedback:
            self.feedback = TokenFeedback(d_model, config.feedback_top_k)
        if config.stops_by_token:
            self.halting = HaltingHead(d_model, config.gate_hidden)
        else:
            self.boundary = BoundaryHead(d_model, config.gate_hidden, config.max_chunk_len)
        # A device_map may have spread the layers. Each refinement cell goes to the device of its
        # layer, the other cells to the device of the embeddings.
        for index, cell in self._cell_of.items():
            cell.to(execution_device(self.layers[index]))
        for module in self.cells()[1:]:
            module.to(self.device)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder layers of the base."""
        return self._layers[0]

    @property
    def device(self) -> torch.device:
        """The device of input tokens, logits, top hidden states and losses."""
        return execution_device(self.base.get_input_embeddings())

    @property
    def active(self) -> bool:
        """Whether the loop runs: recursion is enabled, with inner steps, and not inside
        `disabled()`."""
        return self._active

    def cells(self) -> list[nn.Module]:
        """The components around the base; empty when recursion is disabled."""
        parts = (self.refine_cells, self.latent, self.feedback, self.boundary, self.halting)
        return [m for m in parts if m is not None]

    def cells_state_dict(self) -> dict[str, Tensor]:
        """The weights of the cells by name, without those of the base."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith("base.")}

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the cells. The base keeps its mode: the gates of some released models
        refuse training mode, and gradients flow through them in eval mode too."""
        self.training = mode
        for module in self.cells():
            module.train(mode)
        return self

    def eval(self) -> Self:
        """Put cells and base into eval mode."""
        self.base.eval()
        return self.train(False)

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
        """One full-depth pass of the base. With `states`, the cells refine the stream.

        Args:
            cache: What the base has read so far; updated.
            mask: Attention mask [B, S + W] over cache and inputs, or None when nothing is padded.
            states: Cell states by layer index, each [B, W, S]; updated.
            inputs: `input_ids` [B, W] or `inputs_embeds` [B, W, D], and further arguments of the
                base. Those that its forward does not take are left out.

        Returns: top hidden state [B, W, D] and logits [B, W, V].
        """
        captured: dict[str, Tensor] = {}

        def refine(cell: RefineCell, index: int, states: dict[int, Tensor]):
            def hook(_layer: nn.Module, _args: Any, output: Any) -> Any:
                h = output[0] if isinstance(output, tuple) else output
                h, states[index] = cell(h, states.get(index))
                return (h, *output[1:]) if isinstance(output, tuple) else h

            return hook

        def capture(_layer: nn.Module, _args: Any, output: Any) -> None:
            captured["h_top"] = output[0] if isinstance(output, tuple) else output

        handles = []
        try:
            if states is not None:
                for index, cell in self._cell_of.items():
                    hook = refine(cell, index, states)
                    handles.append(self.layers[index].register_forward_hook(hook))
            handles.append(self.layers[-1].register_forward_hook(capture))
            if mask is not None:
                width = next(iter(inputs.values())).shape[1]
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
            inputs = {k: v for k, v in inputs.items() if k in self._accepted}
            inputs[self._cache_argument] = cache
            with self._refetching.graph() if self._refetching else nullcontext():
                logits = self.base(**inputs, attention_mask=mask, use_cache=True).logits
        finally:
            for handle in handles:
                handle.remove()
        return captured["h_top"].to(self.device), logits.to(self.device)

    def passes(self) -> Passes:
        """The passes of one generation. Call this again when weights have changed."""
        if ShortPasses.serves(self.base):
            short = ShortPasses(self.base, self._cell_of, self.run_base)
            return Passes(short.run, MAX_TOKENS, takes_back=True)
        run = self.run_base
        if self._refetching is None and FewRows.serves(self.base):
            run = FewRows(self.base, self._cell_of.values(), run).run
        return Passes(run, self.config.chunk_width, takes_back(self.new_cache()))

    @property
    def _cell_of(self) -> dict[int, RefineCell]:
        """The refinement cells by the index of their layer."""
        cells = cast("Iterable[RefineCell]", self.refine_cells or ())
        return dict(zip(self.refined_layers, cells, strict=True))

    def encode(self, input_ids: Tensor, cache: Cache, mask: Tensor | None = None) -> Cache:
        """The cache after the base has read `input_ids` [B, T]; `cache` itself does not change."""
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
            input_ids: The chunk's tokens [B, W], if they were edited since the step before.
        """
        ids = chunk.input_ids if input_ids is None else input_ids
        embeds = self.next_inputs(ids, chunk.h_top, chunk.logits)
        states = self.next_states(chunk.states)
        h_top, logits = self.run_base(fork(chunk.prefix), chunk.mask, states, inputs_embeds=embeds)
        halting = self.next_halting(chunk.halting, chunk.h_top, h_top, logits)
        return ChunkState(
            chunk.prefix, chunk.committed, ids, chunk.mask, chunk.step + 1, h_top, logits, states,
            halting,
        )  # fmt: skip

    @property
    def reads_logits(self) -> bool:
        """Whether a step reads the logits of the step before, at every position."""
        config = self.config
        return self.feedback is not None and not config.single_pass and config.max_inner_steps > 0

    def next_inputs(self, input_ids: Tensor, h_top: Tensor, logits: Tensor | None) -> Tensor:
        """What the next step reads.

        Args:
            input_ids: The tokens [B, W].
            h_top: Top hidden state of the step before [B, W, D].
            logits: Of the step before [B, W, V]; read only with `reads_logits`.

        Returns: [B, W, D].
        """
        embed = self.base.get_input_embeddings()
        inputs = embeds = embed(input_ids)
        if self.latent is not None:
            before = torch.zeros_like(h_top) if self.config.single_pass else h_top
            inputs = self.latent(embeds, before)
        if self.reads_logits:
            assert self.feedback is not None and logits is not None
            inputs = inputs + self.feedback(embeds, h_top, logits, embed)
        return inputs

    def next_states(self, states: dict[int, Tensor]) -> dict[int, Tensor]:
        """The cell states that the next step starts from: a copy that it may update."""
        return {} if self.config.single_pass else dict(states)

    @property
    def halts(self) -> bool:
        """Whether each position stops on its own."""
        return self.halting is not None and self.config.max_inner_steps > 1

    def next_halting(
        self, before: Halting | None, h_before: Tensor, h_top: Tensor, logits: Tensor
    ) -> Halting | None:
        """As `halting.next_halting`; None where no position stops on its own."""
        if self.halting is None or not self.halts:
            return None
        threshold = self.config.commit_threshold
        return next_halting(self.halting, threshold, before, h_before, h_top, logits)

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
