"""Guesses of what the base drafts next, so that one pass drafts several tokens.

A guess costs no pass (prompt lookup decoding, Saxena 2023): what followed the same last tokens
before, in the text or in what the refined model said behind a token that it rejected. The base
reads a guess in one pass with the last token, and its own draft counts as far as both agree. So
the drafts are those of the base, token for token, and only the number of passes is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

# Tokens of a guess by how many last tokens it follows. Reading two tokens costs hardly more than
# reading one, reading six about half more.
LENGTHS = {2: 5, 1: 1}
MIN_SAVED = {2: 0.25, 1: 0.15}  # passes that a guess must save to be worth its cost
MEMORY = 4  # guesses that the average of saved passes looks back on
RISE = 0.01  # of this average at each guess that is withheld: some time one is made again


class Guesses:
    """Of one row.

    Args:
        text: The prompt.
    """

    def __init__(self, text: Sequence[int]):
        self.text = list(text)
        self.after: dict[tuple[int, ...], list[int]] = {}
        self.saved = dict.fromkeys(LENGTHS, 1.0)  # passes that a guess saves, on average
        self.num_matched = max(LENGTHS)  # last tokens that the last guess followed
        self._read(self.text)

    def next(self, drafted: Sequence[int]) -> list[int]:
        """A guess of what follows the text and the `drafted` tokens; empty when there is none."""
        last = (*self.text[-2:], *drafted)
        for num_matched, least in MIN_SAVED.items():
            if not (found := self.after.get(last[-num_matched:])):
                continue
            if self.saved[num_matched] >= least:
                self.num_matched = num_matched
                return found
            self.saved[num_matched] += RISE
        return []

    def learn(self, num_saved: int) -> None:
        """Count the last guess, of which the base drafted the first `num_saved` tokens itself."""
        self.saved[self.num_matched] += (num_saved - self.saved[self.num_matched]) / MEMORY

    def add(self, tokens: Sequence[int], rejected: Sequence[int]) -> None:
        """Append tokens to the text; `rejected` is what the refined model said behind them."""
        num_old = len(self.text)
        self.text += tokens
        self._read([*self.text[-2:], *rejected])
        self._read(self.text[max(0, num_old - 1 - max(LENGTHS.values())) :])

    def _read(self, tokens: Sequence[int]) -> None:
        for num_matched, length in LENGTHS.items():
            for i in range(num_matched, len(tokens)):
                self.after[tuple(tokens[i - num_matched : i])] = list(tokens[i : i + length])
