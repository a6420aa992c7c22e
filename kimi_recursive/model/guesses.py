"""Guesses of what the base drafts next, so that one pass drafts several tokens.

A guess costs no pass (prompt lookup decoding, Saxena 2023): what followed the same two tokens
before, in the text or in what the refined model said behind a token that it rejected. The base
reads a guess in one pass with the last token, and its own draft counts as far as both agree. So
the drafts are those of the base, token for token, and only the number of passes is smaller.
"""

from __future__ import annotations

from collections.abc import Sequence

LENGTH = 3  # with the last token four are read, which costs little more than one
MIN_SAVED = 0.25  # passes that a guess must save to be worth its cost
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
        self.saved = 1.0  # passes that a guess saves, on average
        self._read(self.text)

    def next(self, drafted: Sequence[int]) -> list[int]:
        """A guess of what follows the text and the `drafted` tokens; empty when there is none."""
        last = (*self.text[-2:], *drafted)[-2:]
        found = self.after.get(last, [])
        if found and self.saved < MIN_SAVED:
            self.saved += RISE
            return []
        return found

    def learn(self, num_saved: int) -> None:
        """Count a guess, of which the base drafted the first `num_saved` tokens itself."""
        self.saved += (num_saved - self.saved) / MEMORY

    def add(self, tokens: Sequence[int], rejected: Sequence[int]) -> None:
        """Append tokens to the text; `rejected` is what the refined model said behind them."""
        num_old = len(self.text)
        self.text += tokens
        self._read([*self.text[-2:], *rejected])
        self._read(self.text[max(0, num_old - 1 - LENGTH) :])

    def _read(self, tokens: Sequence[int]) -> None:
        for i in range(2, len(tokens)):
            self.after[tokens[i - 2], tokens[i - 1]] = list(tokens[i : i + LENGTH])
