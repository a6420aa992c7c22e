"""Windows of tokens: random ones for training, all of a document for evaluation.

Plain text is cut into windows of `context_length` tokens. A pair is one window, whose chunks lie on
the grid of generation: the inputs that predict the completion start with the last prompt token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np

from kimi_recursive.data.corpus import integer
from kimi_recursive.data.tokens import TokenSplit, load_tokens

IGNORED = -100  # as a target: counts in no loss


@dataclass(frozen=True)
class Batch:
    """What a training step sees.

    Attributes:
        inputs, targets: int64 [B, T]; a target is the token behind its input, or `IGNORED`.
        mask: bool [B, T], False for padding on the left; None when nothing is padded.
        chunk_start: Where the chunk to refine starts in every row; None when any chunk will do.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray | None = None
    chunk_start: int | None = None


class Sampler(ABC):
    """Batches that are a pure function of (seed, step)."""

    def __init__(self, batch_size: int, seed: int, count: int):
        self.batch_size = integer("batch_size", batch_size, 1)
        self.seed = integer("seed", seed, 0)
        self._count = count

    def numbers(self, step: int) -> np.ndarray:
        """Which of `count` examples a step takes, each equally likely, int64 [batch_size]."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        return generator.integers(self._count, size=self.batch_size)

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """The batch of a step."""


class WindowSampler(Sampler):
    """Random windows of plain text, every start inside a document equally likely.

    Raises:
        ValueError: every document is shorter than a window.
    """

    def __init__(self, split: TokenSplit, context_length: int, batch_size: int, seed: int) -> None:
        self.split, self.window = split, integer("context_length", context_length, 1) + 1
        lengths = np.diff(split.offsets)
        starts = np.maximum(lengths - self.window + 1, 0)
        if not starts.any():
            longest = f"the longest document has {lengths.max(initial=0)}"
            raise ValueError(f"window: no document has {self.window} tokens; {longest}")
        self._last = np.cumsum(starts)
        # Number r among all valid starts, in document d, is token r + shift[d].
        self._shift = split.offsets[:-1] - (self._last - starts)
        super().__init__(batch_size, seed, self._last[-1])

    def batch(self, step: int) -> Batch:
        number = self.numbers(step)
        start = number + self._shift[np.searchsorted(self._last, number, side="right")]
        rows = self.split.tokens[start[:, None] + np.arange(self.window)].astype(np.int64)
        return Batch(rows[:, :-1], rows[:, 1:])


class ChunkSampler(Sampler):
    """Random chunks of a split with pairs, every chunk equally likely.

    The chunks of a pair lie on its completion, those of plain text on the whole of it. A row holds
    a chunk and, before it, what fits of the document into `context_length` tokens.

    Args:
        width: Inputs of a chunk; None for one chunk that takes the rest of the document, and the
            prompt in the same row.
    """

    def __init__(
        self, split: TokenSplit, context_length: int, batch_size: int, seed: int, width: int | None
    ) -> None:
        assert split.num_prompt is not None, "the split has pairs"
        size = integer("context_length", context_length, 1)
        self.split, self.width = split, width
        inputs = np.diff(split.offsets) - 1
        grid = split.num_prompt - 1
        num_chunks = np.ones_like(grid) if width is None else -(-(inputs - grid) // width)
        self._last = np.cumsum(num_chunks)
        self._first = self._last - num_chunks
        if width is None:
            self._before, self._inside = 0, min(size, int(inputs.max()))
        else:
            self._before = min(size - width, int((grid + (num_chunks - 1) * width).max()))
            self._inside = width
        super().__init__(batch_size, seed, self._last[-1])

    def batch(self, step: int) -> Batch:
        shape = (self.batch_size, self._before + self._inside)
        inputs, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=bool)
        targets = np.full(shape, IGNORED, dtype=np.int64)
        assert self.split.num_prompt is not None
        for row, number in enumerate(self.numbers(step)):
            document = int(np.searchsorted(self._last, number, side="right"))
            tokens, prompt = self.split.document(document), int(self.split.num_prompt[document])
            chunk = 0
            if self.width is not None:
                chunk = prompt - 1 + self.width * int(number - self._first[document])
            first = max(0, chunk - self._before)
            at = self._before - (chunk - first)
            held = tokens[first : first + shape[1] - at + 1]
            inputs[row, at : at + len(held) - 1] = held[:-1]
            mask[row, at:] = True
            answers = slice(max(at, at + prompt - 1 - first), at + len(held) - 1)
            targets[row, answers] = held[1:][answers.start - at :]
        if self.width is not None:
            targets[:, : self._before] = IGNORED
        return Batch(inputs, targets, None if mask.all() else mask, self._before)


def training_sampler(
    split: TokenSplit, context_length: int, batch_size: int, seed: int, width: int | None
) -> Sampler:
    """The sampler of a split: of windows, or where it holds pairs of chunks.

    Args:
        width: Inputs of the chunk that a step refines; None where a step reads whole windows.

    Raises:
        ValueError: every document is shorter than a window.
    """
    if split.num_prompt is None:
        return WindowSampler(split, context_length, batch_size, seed)
    return ChunkSampler(split, context_length, batch_size, seed, width)


@dataclass(frozen=True)
class Window:
    """Tokens of one document from position `start`.

    Attributes:
        inputs, targets: The tokens and those behind them, int64 [L].
        chunk_start: Inputs before the first chunk, whose targets do not count.
    """

    document: int
    start: int
    inputs: np.ndarray
    targets: np.ndarray
    chunk_start: int = 0

    @property
    def num_targets(self) -> int:
        """Targets that count."""
        return len(self.targets) - self.chunk_start


def document_windows(
    split: TokenSplit, context_length: int, max_windows: int | None
) -> list[Window]:
    """Cut each document from its start, so that each token but the first is a target once.

    A window has `context_length` inputs; the last window of a document has the rest. Windows come
    in document order, at most `max_windows` of a document (None: all). A pair is one window; what
    does not fit is cut from the start of its prompt.

    Raises:
        ValueError: `context_length` or `max_windows` is below 1, or a completion does not fit.
    """
    size = integer("context_length", context_length, 1)
    limit = None if max_windows is None else integer("max_windows", max_windows, 1)
    windows = []
    for i in range(len(split.document_ids)):
        tokens = split.document(i).astype(np.int64)
        prompt = 1 if split.num_prompt is None else int(split.num_prompt[i])
        if split.groups is not None and prompt > 1:
            windows.append(_pair_window(split, i, tokens, prompt, size))
            continue
        for s in list(range(0, len(tokens) - 1, size))[:limit]:
            windows.append(Window(i, s, tokens[s:-1][:size], tokens[s + 1 :][:size]))
    return windows


def _pair_window(split: TokenSplit, i: int, tokens: np.ndarray, prompt: int, size: int) -> Window:
    start = max(0, len(tokens) - 1 - size)
    if start > prompt - 1:
        raise ValueError(
            f"{split.document_ids[i]}: the completion has {len(tokens) - prompt} tokens, more than "
            f"context_length {size}"
        )
    return Window(i, start, tokens[start:-1], tokens[start + 1 :], prompt - 1 - start)


def validation_windows(
    tokens_dir: Path, context_length: int, num_windows: int, split: str = "validation"
) -> list[Window]:
    """The first windows of a split: pairs, and of plain text whole windows, at most two of a
    document.

    Raises:
        ValueError: no document is long enough, or a completion does not fit.
    """
    windows = document_windows(load_tokens(tokens_dir, split), context_length, 2)
    whole = [w for w in windows if len(w.inputs) == context_length or w.chunk_start]
    if not whole:
        path = Path(tokens_dir, f"{split}.parquet")
        raise ValueError(
            f"{path}: no document has {context_length + 1} tokens (context_length {context_length})"
        )
    return whole[:num_windows]


def batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    """Windows of equal length and chunk grid together, in a fixed order, at most `batch_size` of
    them."""

    def shape(window: Window) -> tuple[int, int]:
        return -len(window.inputs), window.chunk_start

    for _, group in groupby(sorted(windows, key=shape), key=shape):
        group = list(group)
        for i in range(0, len(group), batch_size):
            yield group[i : i + batch_size]
