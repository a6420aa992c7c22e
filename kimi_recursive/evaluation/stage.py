"""One evaluation from a model's folder to its files."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kimi_recursive.data.tokens import load_tokens
from kimi_recursive.evaluation.scores import evaluate_model
from kimi_recursive.evaluation.settings import EvaluationSpec
from kimi_recursive.files import (
    NUMERICS_VERSION,
    file_digest,
    git_state,
    read_json_object,
    read_parquet,
    versions,
    write_json,
    write_parquet,
)
from kimi_recursive.layout import EvaluationFiles
from kimi_recursive.model.config import RecursiveConfig
from kimi_recursive.model.digests import model_digest, sidecar_digests
from kimi_recursive.model.loading import load_model_with_config, numeric
from kimi_recursive.model.placement import placed
from kimi_recursive.model.sidecar import base_of
from kimi_recursive.published import Published


def evaluate_stage(
    spec: EvaluationSpec,
    model_path: str | Path,
    tokens_dir: str | Path,
    files: EvaluationFiles,
    config: RecursiveConfig | None = None,
    overrides: Mapping[str, Any] | None = None,
    keep: bool = False,
    **load_options: Any,
) -> dict[str, Any]:
    """Load a model, evaluate it, write results and scores by document.

    Args:
        files: What to write.
        keep: Keep the scores in `files.published`, or take them from there if they were made of the
            same model and text. Generations are always made.
        config: By default the sidecar's own, or recursion disabled for a base.
        overrides: Parameters to change in that config.
        load_options: Passed on to `load_model_with_config`; the device is training's by default.

    Raises:
        ValueError: from loading or evaluating.
    """
    wrapper, tokenizer, config = load_model_with_config(
        model_path, config=config, overrides=overrides, **placed(load_options)
    )
    about = {
        "versions": versions(),
        **git_state(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    scored = published = None
    if keep:
        published = _keeper(spec, model_path, tokens_dir, files, config, load_options)
    if published is not None and published.fits():
        published.restore()
        scores = read_json_object(files.results)
        scored, about = (scores, read_parquet(files.documents)), {k: scores[k] for k in about}
        print(f"evaluate: the scores are taken from {published.folder}", file=sys.stderr)
    results, documents = evaluate_model(
        wrapper,
        tokenizer,
        load_tokens(Path(tokens_dir), spec.split),
        spec.settings,
        spec.depths,
        scored,
    )
    lora = [p.numel() for name, p in wrapper.base.named_parameters() if ".lora_" in name]
    results = {
        **results,
        "stage": spec.stage,
        "model_path": str(model_path),
        "split": spec.split,
        "num_parameters": {
            "base": sum(p.numel() for p in wrapper.base.parameters()) - sum(lora),
            "sidecar": sum(
                p.numel() for m in wrapper.cells() for p in m.parameters() if wrapper.active
            ),
            "lora": sum(lora),
        },
        "config": config.to_dict(),
        "evaluation": {**spec.settings.to_dict(), "depths": list(spec.depths)},
        "dtype": str(wrapper.base.dtype).removeprefix("torch."),
        "upstream": spec.upstream,
        **about,
    }
    if scored is None:
        write_parquet(files.documents, documents)
    write_json(files.results, results)
    if published is not None:
        published.keep()
    return results


def _keeper(
    spec: EvaluationSpec,
    model_path: str | Path,
    tokens_dir: str | Path,
    files: EvaluationFiles,
    config: RecursiveConfig,
    load_options: Mapping[str, Any],
) -> Published:
    """What keeps the scores of an evaluation, under all that decides them."""
    revision = load_options.get("revision")
    fingerprint = {
        "base": model_digest(base_of(model_path), revision),
        "sidecar": sidecar_digests(model_path),
        "config": config.to_dict(),
        "tokens": file_digest(Path(tokens_dir) / f"{spec.split}.parquet"),
        "settings": spec.settings.scoring(),
        "depths": list(spec.depths),
        "load": numeric(load_options),
        "numerics": NUMERICS_VERSION,
    }
    return Published(files.published, (files.results, files.documents), fingerprint)
