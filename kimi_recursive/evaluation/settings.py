"""The section `evaluation` of the workflow's config; its schema limits the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class EvaluationSettings:
    """What every evaluation measures.

    Attributes:
        context_length: Tokens of a window.
        batch_size: Windows that are scored at a time.
        max_windows_per_document: Windows of each document, from its start; None for all.
        prompts: Texts that the model continues, greedily.
        max_new_tokens: Tokens added to a prompt.
    """

    context_length: int
    batch_size: int
    max_windows_per_document: int | None
    prompts: list[str]
    max_new_tokens: int

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EvaluationSettings:
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As the config and the results file have them."""
        return asdict(self)
