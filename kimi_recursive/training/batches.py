"""The windows that a training sees: this process's share of each batch, and those of validation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kimi_recursive.data.settings import PRETRAIN
from kimi_recursive.data.tokens import load_tokens, splits_in
from kimi_recursive.data.windows import (
    IGNORED,
    Sampler,
    Window,
    training_sampler,
    validation_windows,
)
from kimi_recursive.files import file_digest
from kimi_recursive.model.checks import check_context
from kimi_recursive.model.wrapper import ChunkRefineWrapper
from kimi_recursive.processes import distributed
from kimi_recursive.training.settings import BaseTraining, PhaseSettings


@dataclass(frozen=True)
class Batch:
    """A `data.windows.Batch` as tensors.

    Attributes:
        inputs, targets: int64 [B, T].
        mask: bool [B, T], or None.
        chunk_start: Where the chunk to refine starts, or None.
        num_targets: Targets that count in each row of the whole batch, those of other processes
            and parts among them, on the CPU; None where every target counts.
    """

    inputs: Tensor
    targets: Tensor
    mask: Tensor | None = None
    chunk_start: int | None = None
    num_targets: Tensor | None = None

    @classmethod
    def of_windows(cls, windows: Tensor) -> Batch:
        """Of plain text [B, T + 1]."""
        return cls(windows[:, :-1], windows[:, 1:])

    def __len__(self) -> int:
        return len(self.inputs)

    def rows(self, rows: slice) -> Batch:
        """Some of its rows."""
        mask = None if self.mask is None else self.mask[rows]
        return replace(self, inputs=self.inputs[rows], targets=self.targets[rows], mask=mask)

    def first_row(self) -> Batch:
        """Its first row, as if each process had no other."""
        counts = self.num_targets
        counts = None if counts is None else counts[: distributed.num_processes()]
        return replace(self.rows(slice(1)), num_targets=counts)

    def chunk(self, start: int, width: int) -> Batch:
        """The chunk from `start`; its mask also covers what is before."""
        stop = start + width
        mask = None if self.mask is None else self.mask[:, :stop]
        inputs, targets = self.inputs[:, start:stop], self.targets[:, start:stop]
        return Batch(inputs, targets, mask, num_targets=self.num_targets)


@dataclass(frozen=True)
class Batches:
    """Batches that are a pure function of (seed, step).

    Attributes:
        rows: The rows of a batch that this process takes.
        validation: The same windows for every seed and arm.
    """

    sampler: Sampler
    rows: slice
    validation: list[Window]

    @classmethod
    def of_phase(cls, tokens_dir: Path, settings: PhaseSettings, seed: int, width: int) -> Batches:
        """What a phase trains on.

        Args:
            width: Tokens of a chunk.

        Raises:
            ValueError: no document is as long as a window, or the batch size is no multiple of the
                number of processes.
        """
        context, size = settings.context_length, settings.batch_size
        return cls(
            training_sampler(load_tokens(tokens_dir, "train"), context, size, seed, width),
            distributed.share(size),
            validation_windows(tokens_dir, context, settings.num_validation_windows),
        )

    @classmethod
    def of_base(cls, tokens_dir: Path, settings: BaseTraining, seed: int) -> Batches:
        """What a base from scratch trains on: the split `pretrain` where there is one, which it
        also validates on, since it is to know it by heart. Raises as `of_phase`."""
        context, size = settings.context_length, settings.batch_size
        split = splits_in(tokens_dir)[0]
        validation = PRETRAIN if split == PRETRAIN else "validation"
        return cls(
            training_sampler(load_tokens(tokens_dir, split), context, size, seed, None),
            distributed.share(size),
            validation_windows(tokens_dir, context, settings.num_validation_windows, validation),
        )

    def at(self, step: int, device: torch.device) -> Batch:
        """This process's rows of a step."""
        batch = self.sampler.batch(step)

        def tensor(array):
            return None if array is None else torch.from_numpy(array[self.rows]).to(device)

        inputs, targets, mask = map(tensor, (batch.inputs, batch.targets, batch.mask))
        assert inputs is not None and targets is not None
        counts = None
        if batch.chunk_start is not None:
            counts = torch.from_numpy((batch.targets != IGNORED).sum(1))
        return Batch(inputs, targets, mask, batch.chunk_start, counts)


def token_digests(tokens_dir: str | Path) -> dict[str, str]:
    """sha256 of the tokens that a training reads, by split; for its fingerprint."""
    folder = Path(tokens_dir)
    read = [split for split in splits_in(folder) if split != "test"]
    return {split: file_digest(folder / f"{split}.parquet") for split in read}


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
