"""The windows that a training sees: this process's share of each batch, and those of validation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kimi_recursive.data.tokens import load_tokens
from kimi_recursive.data.windows import Window, WindowSampler, validation_windows
from kimi_recursive.files import file_digest
from kimi_recursive.model.loop import check_context
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.processes import distributed
from kimi_recursive.training.settings import BaseTraining, PhaseSettings


@dataclass(frozen=True)
class Batches:
    """Batches that are a pure function of (seed, step).

    Attributes:
        rows: The rows of a batch that this process takes.
        validation: The same windows for every seed and arm.
    """

    sampler: WindowSampler
    rows: slice
    validation: list[Window]

    @classmethod
    def open(cls, tokens_dir: Path, settings: PhaseSettings | BaseTraining, seed: int) -> Batches:
        """Read the tokens of a folder.

        Raises:
            ValueError: no document is as long as a window, or the batch size is no multiple of the
                number of processes.
        """
        context = settings.context_length
        return cls(
            WindowSampler(load_tokens(tokens_dir, "train"), context + 1, settings.batch_size, seed),
            distributed.share(settings.batch_size),
            validation_windows(tokens_dir, context, settings.num_validation_windows),
        )

    def at(self, step: int, device: torch.device) -> Tensor:
        """This process's windows of a step [B, T + 1]."""
        return torch.from_numpy(self.sampler.batch(step)[self.rows]).to(device)


def token_digests(tokens_dir: str | Path) -> dict[str, str]:
    """sha256 of the tokens that a training reads, by split; for its fingerprint."""
    return {s: file_digest(Path(tokens_dir) / f"{s}.parquet") for s in ("train", "validation")}


def check_windows(wrapper: ChunkRefineWrapper, context: int, name: str = "context_length") -> None:
    """Raises ValueError when windows of `context` tokens are no whole chunks, or too long.

    Args:
        name: Of the setting, for the message.
    """
    width = wrapper.config.chunk_width
    if context % width:
        raise ValueError(
            f"{name} ({context}) must be a multiple of recursive.chunk_width ({width})"
        )
    check_context(wrapper.base, context, name)
