"""What an evaluation measures: the section `evaluation` of the workflow's config, and a spec."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

PROMPT_KEYS = ("prompts", "max_new_tokens")


@dataclass(frozen=True)
class TaskSettings:
    """Tasks of lm-evaluation-harness: the section `evaluation.tasks`.

    Attributes:
        names: Of tasks, groups or tags; none for no tasks.
        include_path: Folder with tasks beside those of the harness.
        num_fewshot: Solved examples in a prompt; None for what each task says.
        limit: Samples of each task, from its start; None for all.
        batch_size: Requests at a time.
        max_length: Tokens that a model reads; None for as many as its base has positions.
        steps: Inner steps at which the recursive arm is asked; None for all that say something.
    """

    names: Sequence[str] = ()
    include_path: str | None = None
    num_fewshot: int | None = None
    limit: int | None = None
    batch_size: int = 1
    max_length: int | None = None
    steps: Sequence[int] | None = None

    def numeric(self) -> dict[str, Any]:
        """The settings that decide the numbers of one job, which asks at one inner step."""
        found = asdict(self) | {"names": list(self.names)}
        del found["steps"]
        return found


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
        tasks: What each model is asked beside its perplexity, in jobs and files of its own.
    """

    context_length: int
    batch_size: int
    max_windows_per_document: int | None
    prompts: list[str]
    max_new_tokens: int
    chain_of_thought_tokens: int = 0
    tasks: TaskSettings = field(default_factory=TaskSettings)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EvaluationSettings:
        return cls(**{**values, "tasks": TaskSettings(**values.get("tasks", {}))})

    def to_dict(self) -> dict[str, Any]:
        """As the config and the results file have them, without the tasks."""
        return {k: v for k, v in asdict(self).items() if k != "tasks"}

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


@dataclass(frozen=True)
class TaskSpec:
    """The tasks, asked of one model at one inner step.

    Attributes:
        stage: Names what is asked, such as `baseline`.
        step: The inner step; 0 is the base in one plain pass.
        upstream: What made base and corpus, recorded with the results.
    """

    stage: str
    step: int
    settings: TaskSettings
    upstream: Mapping[str, Any] | None = None
