"""The gate before training: untrained cells are evaluated, and must change nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from kimi_recursive.evaluation.settings import EvaluationSettings, EvaluationSpec
from kimi_recursive.evaluation.stage import evaluate_stage
from kimi_recursive.evaluation.zero_init import compare_zero_init
from kimi_recursive.layout import EvaluationFiles
from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig


def prove_zero_init(
    base_dir: Path,
    surgery_dir: Path,
    tokens_dir: Path,
    settings: EvaluationSettings,
    overrides: Mapping[str, Any],
    output_path: Path,
    **load_options: Any,
) -> dict[str, Any]:
    """Evaluate base and untrained cells on the first window of each test document, and write what
    `compare_zero_init` finds.

    The matrix's own evaluations are not read: they are made again for reasons that are none for
    training again.

    Args:
        settings: Windows and prompts of the two evaluations.
        overrides: How the cells generate, as in `evaluate_stage`.
        load_options: Passed on to `load_model_with_config`.

    Returns: what is written to `output_path`.

    Raises:
        ValueError: from loading or evaluating.
    """
    settings = replace(settings, max_windows_per_document=1)
    width = RecursiveConfig.from_file(surgery_dir / CONFIG_NAME).chunk_width
    with tempfile.TemporaryDirectory(prefix="kimi-recursive-") as scratch:

        def evaluated(stage: str, model: Path, changed: Mapping[str, Any]) -> EvaluationFiles:
            files, spec = EvaluationFiles(Path(scratch), stage), EvaluationSpec(stage, settings)
            evaluate_stage(spec, model, tokens_dir, files, overrides=changed, **load_options)
            return files

        return compare_zero_init(
            evaluated("baseline", base_dir, {"chunk_width": width}),
            evaluated("after_surgery", surgery_dir, overrides),
            surgery_dir,
            tokens_dir,
            settings,
            output_path,
            **load_options,
        )
