"""`ChunkRefineWrapper`: the chunk loop as a model that scores and generates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from kimi_recursive.model.generation import generate_chunks, generate_with_base
from kimi_recursive.model.loop import ChunkLoop
from kimi_recursive.model.sidecar import is_local, save_sidecar


class ChunkRefineWrapper(ChunkLoop):
    """A `ChunkLoop` with its public windows: logits by inner step, forward, generation.

    Shapes: as in `kimi_recursive.model.loop`.
    """

    @contextmanager
    def disabled(self) -> Iterator[PreTrainedModel]:
        """Inside, the wrapper gives exactly what its base gives. What phases B and C trained inside
        the base stays there: see `drop_adapter`."""
        before, self._active = self._active, False
        try:
            yield self.base
        finally:
            self._active = before

    def drop_adapter(self) -> PreTrainedModel:
        """Give the base its pretrained weights back, bit for bit; returns the base."""
        if self.adapter is not None:
            self.adapter.drop()
            self.adapter = None
        return self.base

    def save_pretrained(self, folder: str | Path, base_path: str | Path | None = None) -> None:
        """Save cells, config, and what was trained inside the base, as a sidecar. Load it with
        `load_model_with_config(folder)`. The base is named in it, not copied.

        Args:
            folder: The folder of the sidecar; made where it is missing.
            base_path: The base, a folder or a Hub id; by default where it was loaded from.

        Raises:
            ValueError: recursion is disabled, or nobody has said where the base is.
        """
        where = str(base_path or self.base.name_or_path)
        if not where:
            raise ValueError(
                "save_pretrained: the base was not loaded from anywhere; save it with "
                "base.save_pretrained(FOLDER), and give base_path=FOLDER"
            )
        if is_local(where) and not Path(where).is_dir():
            raise ValueError(f"{where}: no such model directory (base_path)")
        save_sidecar(self, folder, where, self.phase, self.revision)

    def step_logits(
        self,
        input_ids: Tensor,
        chunk_start: int = 0,
        num_steps: int | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of one chunk, of at most `chunk_width` tokens, at every inner step. `forward`
        takes texts of any length.

        Args:
            input_ids: [B, P + W]; the chunk is `input_ids[:, chunk_start:]`, the rest its prefix.
            num_steps: Inner steps, `max_inner_steps` by default.
            attention_mask: [B, P + W], 0 for padding on the left.

        Returns:
            [num_steps + 1, B, W, V]; index 0 is the base. One step only when not active.

        Raises:
            ValueError: `chunk_start` is outside the input, or the chunk is longer than
                `chunk_width`.
        """
        if not 0 <= chunk_start < input_ids.shape[1]:
            raise ValueError(
                f"chunk_start must be from 0 to {input_ids.shape[1] - 1}, got {chunk_start}"
            )
        if input_ids.shape[1] - chunk_start > self.config.chunk_width:
            raise ValueError(
                f"step_logits takes one chunk: input_ids[:, {chunk_start}:] has "
                f"{input_ids.shape[1] - chunk_start} tokens, more than chunk_width = "
                f"{self.config.chunk_width}; model(input_ids) scores a longer text"
            )
        chunk = next(self.chunks(input_ids, attention_mask, chunk_start))
        return torch.stack([state.output for state in self.steps(chunk, num_steps)])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_steps: int | None = None,
        chunk_start: int = 0,
    ) -> CausalLMOutputWithPast:
        """Logits of the last inner step, chunk by chunk on the grid from position `chunk_start`.

        Args:
            input_ids: [B, T].
            attention_mask: [B, T], 0 for padding on the left.
            labels: [B, T], -100 where ignored; they are shifted inside, as in transformers.
            num_steps: Inner steps, `max_inner_steps` by default.
            chunk_start: The positions before it are a prefix, which the base reads; 0 to T - 1.

        Returns: logits [B, T - chunk_start, V] (of the base [B, T, V] when not active), and with
            labels the mean cross-entropy of these positions, float32, in nats.
        """
        if not self.active:
            return self.base(input_ids=input_ids, attention_mask=attention_mask, labels=labels)
        logits = torch.cat(
            [
                self.last_step(chunk, num_steps).output
                for chunk in self.chunks(input_ids, attention_mask, chunk_start)
            ],
            dim=1,
        )
        loss = None
        if labels is not None:
            targets = labels[:, chunk_start + 1 :].flatten()
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.no_grad()
    def generate_chunks(self, input_ids: Tensor | None = None, **keywords: Any) -> Any:
        """Generate with the loop, or call `base.generate` with the same arguments when not active;
        those that only the loop has (`OWN_OPTIONS`) are then left out.

        See `kimi_recursive.model.generation.generate_chunks` for arguments, result and errors.
        """
        if not self.active:
            return generate_with_base(self.base, input_ids, **keywords)
        if input_ids is None:
            raise ValueError("input_ids is missing")
        return generate_chunks(self, input_ids, **keywords)

    generate = generate_chunks
