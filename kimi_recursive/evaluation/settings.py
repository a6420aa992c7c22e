"""What an evaluation measures: the section `evaluation` of the workflow's config, and a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PROMPT_KEYS = ("prompts", "max_new_tokens")


@dataclass(frozen=True)
class EvaluationSettings:
    """What every evaluation measures.

    Attributes:
        context_length: Tokens of a window.
        batch_size: Windows that are scored at a time.
        max_windows_per_document: Windows of each document, from its start; None for all.
        prompts: Texts that the model continues, greedily.
        max_new_tokens: Tokens added to a prompt.
        chain_of_thought_tokens: Tokens that the base may write before it answers the prompt of a
            pair.
    """

    context_length: int
    batch_size: int
    max_windows_per_document: int | None
    prompts: list[str]
    max_new_tokens: int
    chain_of_thought_tokens: int = 0

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EvaluationSettings:
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """As the config and the results file have them."""
        return asdict(self)

    def scoring(self) -> dict[str, Any]:
        """The settings that decide scores: all but those of generations."""
        return {k: v for k, v in self.to_dict().items() if k not in PROMPT_KEYS}


@dataclass(frozen=True)
class EvaluationSpec:
    """One evaluation.

    Attributes:
        stage: Names what is evaluated, such as `baseline`.
        split: `train`, `validation` or `test`.
        depths: Numbers of inner steps to score beside 0..K; they do not count in the throughput.
        upstream: What made base and tokens, recorded with the results.
    """

    stage: str
    settings: EvaluationSettings
    split: str = "test"
    depths: Sequence[int] = ()
    upstream: Mapping[str, Any] | None = None
