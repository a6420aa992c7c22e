"""Windows of tokens, for training and for evaluation."""

import numpy as np
import pytest
from commands import error_of

from kimi_recursive.data.tokens import TokenSplit
from kimi_recursive.data.windows import WindowSampler, document_windows


def numbered_split(*lengths: int) -> TokenSplit:
    """Documents whose tokens are 0, 1, 2... over all of them."""
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    tokens = np.arange(offsets[-1], dtype=np.int32)
    return TokenSplit([f"d{i}" for i in range(len(lengths))], tokens, offsets)


def rows_of(sampler: WindowSampler, step: int) -> np.ndarray:
    """The windows of a step with the token behind them [B, T + 1]."""
    batch = sampler.batch(step)
    assert batch.mask is None and batch.chunk_start is None
    return np.concatenate([batch.inputs, batch.targets[:, -1:]], axis=1)


# Reading


def test_batches_stay_inside_documents_and_are_uniform():
    split = numbered_split(1, 5, 0, 9, 3, 2, 4)
    sampler = WindowSampler(split, 2, 4000, 11)
    batch = rows_of(sampler, 0)
    assert batch.dtype == np.int64 and batch.shape == (4000, 3)
    assert (np.diff(batch, axis=1) == 1).all()
    valid = [
        s for a, b in zip(split.offsets, split.offsets[1:], strict=False) for s in range(a, b - 2)
    ]
    starts = np.concatenate([rows_of(sampler, step)[:, 0] for step in range(10)])
    values, counts = np.unique(starts, return_counts=True)
    assert values.tolist() == valid
    expected = len(starts) / len(valid)
    # Chi-square with 12 degrees of freedom: above 40 in fewer than 1 of 10,000 seeds.
    assert ((counts - expected) ** 2 / expected).sum() < 40


def test_a_batch_is_a_function_of_seed_and_step():
    split = numbered_split(1000, 500)
    sampler = WindowSampler(split, 7, 16, 3)
    first = [rows_of(sampler, step).tolist() for step in range(6)]
    fresh = WindowSampler(split, 7, 16, 3)
    assert [rows_of(fresh, step).tolist() for step in (5, 0, 5)] == [first[5], first[0], first[5]]
    assert len({str(batch) for batch in first}) == 6
    assert rows_of(WindowSampler(split, 7, 16, 4), 0).tolist() != first[0]
    assert rows_of(WindowSampler(split, 7, 16, 1), 3).tolist() != first[1]


def test_window_bounds():
    split = numbered_split(4, 7)
    assert rows_of(WindowSampler(split, 6, 2, 0), 9).tolist() == [list(range(4, 11))] * 2
    message = error_of(WindowSampler, split, 7, 2, 0)
    assert "8 tokens" in message and "7" in message
    assert "batch_size" in error_of(WindowSampler, split, 4, 0, 0)
    assert "context_length" in error_of(WindowSampler, split, 0, 1, 0)
    assert "seed" in error_of(WindowSampler, split, 4, 1, -1)
    for arguments, name in (((0, None), "context_length"), ((4, 0), "max_windows")):
        assert name in error_of(document_windows, split, *arguments)


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_each_token_but_the_first_is_a_target_once(size):
    split = numbered_split(5, 1, 0, 9, 2)
    windows = document_windows(split, size, None)
    targets = np.concatenate([window.targets for window in windows]).tolist()
    firsts = [int(split.offsets[i]) for i in (0, 1, 3, 4)]
    assert targets == [t for t in range(17) if t not in firsts]
    for window in windows:
        document = split.document(window.document)
        assert window.inputs.dtype == window.targets.dtype == np.int64
        assert 1 <= len(window.inputs) == len(window.targets) <= size
        assert window.start % size == 0
        stretch = document[window.start : window.start + len(window.inputs) + 1].tolist()
        assert [*window.inputs.tolist(), window.targets[-1]] == stretch
        assert (window.targets == window.inputs + 1).all()
        assert len(window.inputs) == size or window.targets[-1] == document[-1]


def test_max_windows_is_per_document():
    split = numbered_split(9, 3, 9)
    windows = document_windows(split, 2, 2)
    assert [(w.document, w.start) for w in windows] == [(0, 0), (0, 2), (1, 0), (2, 0), (2, 2)]
