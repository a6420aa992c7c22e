"""Windows of tokens: random windows for training, consecutive ones for evaluation."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kimi_recursive.data.corpus import integer
from kimi_recursive.data.tokens import TokenSplit, load_tokens


def validation_windows(tokens_dir: Path, context_length: int, num_windows: int) -> list["Window"]:
    """The first whole windows of the validation split, at most two of a document.

    Raises:
        ValueError: no document is long enough.
    """
    windows = document_windows(load_tokens(tokens_dir, "validation"), context_length, 2)
    whole = [window for window in windows if len(window.inputs) == context_length]
    if not whole:
        path = Path(tokens_dir, "validation.parquet")
        raise ValueError(
            f"{path}: no document has {context_length + 1} tokens (context_length {context_length})"
        )
    return whole[:num_windows]


class WindowSampler:
    """Random windows inside documents, every start equally likely.

    Raises:
        ValueError: every document is shorter than a window.
    """

    def __init__(self, split: TokenSplit, window: int, batch_size: int, seed: int) -> None:
        self.split, self.window = split, integer("window", window, 1)
        self.batch_size = integer("batch_size", batch_size, 1)
        self.seed = integer("seed", seed, 0)
        lengths = np.diff(split.offsets)
        starts = np.maximum(lengths - window + 1, 0)
        if not starts.any():
            longest = f"the longest document has {lengths.max(initial=0)}"
            raise ValueError(f"window: no document has {window} tokens; {longest}")
        self._last = np.cumsum(starts)
        # Number r among all valid starts, in document d, is token r + shift[d].
        self._shift = split.offsets[:-1] - (self._last - starts)

    def batch(self, step: int) -> np.ndarray:
        """The batch of a step, int64 `[batch_size, window]`: a pure function of (seed, step)."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        number = generator.integers(self._last[-1], size=self.batch_size)
        start = number + self._shift[np.searchsorted(self._last, number, side="right")]
        return self.split.tokens[start[:, None] + np.arange(self.window)].astype(np.int64)


@dataclass(frozen=True)
class Window:
    """Tokens of one document from position `start`: inputs, targets (next tokens) int64 `[L]`."""

    document: int
    start: int
    inputs: np.ndarray
    targets: np.ndarray


def document_windows(
    split: TokenSplit, context_length: int, max_windows: int | None
) -> list[Window]:
    """Cut each document from its start, so that each token but the first is a target once.

    A window has `context_length` inputs; the last window of a document has the rest. Windows come
    in document order, at most `max_windows` of a document (None: all).

    Raises:
        ValueError: `context_length` or `max_windows` is below 1.
    """
    size = integer("context_length", context_length, 1)
    limit = None if max_windows is None else integer("max_windows", max_windows, 1)
    windows = []
    for i in range(len(split.document_ids)):
        tokens = split.document(i).astype(np.int64)
        for s in list(range(0, len(tokens) - 1, size))[:limit]:
            windows.append(Window(i, s, tokens[s:-1][:size], tokens[s + 1 :][:size]))
    return windows
