"""The proof that after surgery the loop runs and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch

from kimi_recursive.data.tokens import TokenSplit, load_tokens
from kimi_recursive.data.windows import Window, batches, document_windows
from kimi_recursive.evaluation.samples import prompt_ids
from kimi_recursive.evaluation.scores import Scored, evaluate_model, largest_difference
from kimi_recursive.evaluation.settings import EvaluationSettings
from kimi_recursive.files import read_json_object, write_json
from kimi_recursive.model.cells import RefineCell
from kimi_recursive.model.config import CONFIG_NAME, RecursiveConfig
from kimi_recursive.model.loading import load_model_with_config
from kimi_recursive.model.placement import placed
from kimi_recursive.model.wrapper import ChunkRefineWrapper

MAX_DIFFERENCE_PERCENT = 0.1  # of the perplexity and of the accuracy
PERTURBATION_STD = 0.02


def percent(before: float, after: float) -> float:
    """Relative difference in percent of `before`."""
    return abs(after - before) / abs(before) * 100 if before else float(after != before) * 100


@torch.no_grad()
def logit_differences(wrapper: ChunkRefineWrapper, windows: list[Window]) -> dict[str, float]:
    """Largest absolute logit differences over windows of one length.

    Returns:
        `steps_vs_step_0`: any inner step against step 0, on the same path;
        `step_0_vs_base_forward`: the chunked, cached step 0 against one plain call of the base;
        `base_logit_scale`: largest absolute logit, to judge the others by.
    """
    ids = torch.from_numpy(np.stack([w.inputs for w in windows])).to(wrapper.device)
    plain = wrapper.base(input_ids=ids, use_cache=False).logits
    width = wrapper.config.chunk_width
    by_step = path = 0.0
    for number, chunk in enumerate(wrapper.chunks(ids)):
        steps = [state.logits for state in wrapper.steps(chunk)]
        assert len(steps) == wrapper.config.max_inner_steps + 1, "the loop did not run"
        by_step = max(by_step, *(float((s - steps[0]).abs().max()) for s in steps[1:]))
        part = plain[:, number * width : number * width + steps[0].shape[1]]
        path = max(path, float((steps[0] - part).abs().max()))
    return {
        "steps_vs_step_0": by_step,
        "step_0_vs_base_forward": path,
        "base_logit_scale": float(plain.abs().max()),
    }


@torch.no_grad()
def perturbed_difference(wrapper: ChunkRefineWrapper, windows: list[Window]) -> dict[str, float]:
    """Largest logit difference to step 0 after noise on each zero-initialised weight in turn.

    It shows that the loop is in the path: a difference of 0 would make parity worthless. The
    weights are restored.
    """
    cells = cast("Iterable[RefineCell]", wrapper.refine_cells)
    targets = {f"refine_cells.{i}": cell.out.weight for i, cell in enumerate(cells)}
    if wrapper.latent is not None:
        targets["latent"] = wrapper.latent.proj.weight
    if wrapper.feedback is not None and wrapper.reads_logits:
        targets["feedback"] = wrapper.feedback.gate.weight
    differences = {}
    generator = torch.Generator().manual_seed(0)
    for name, weight in targets.items():
        before = weight.clone()
        noise = torch.randn(weight.shape, generator=generator) * PERTURBATION_STD
        weight.add_(noise.to(weight))
        differences[name] = logit_differences(wrapper, windows)["steps_vs_step_0"]
        weight.copy_(before)
    return differences


def prove_zero_init(
    base_dir: Path,
    surgery_dir: Path,
    tokens_dir: Path,
    settings: EvaluationSettings,
    overrides: Mapping[str, Any],
    output_path: Path,
    **load_options: Any,
) -> dict[str, Any]:
    """The gate before training: evaluate base and untrained cells on the first window of each test
    document, and write what `compare_zero_init` finds, whatever the verdict.

    The matrix's own evaluations are not read: an edit of what they measure must not train again.

    Args:
        settings: Windows and prompts of the two evaluations.
        overrides: How the cells generate, as in `evaluate_stage`.
        load_options: Passed on to `load_model_with_config`.

    Returns: what is written to `output_path`.

    Raises:
        ValueError: from loading or evaluating.
    """
    settings, load = replace(settings, max_windows_per_document=1), placed(load_options)
    grid = {"chunk_width": RecursiveConfig.from_file(surgery_dir / CONFIG_NAME).chunk_width}
    base, tokenizer, _ = load_model_with_config(base_dir, overrides=grid, **load)
    split = load_tokens(tokens_dir, "test")
    before = evaluate_model(base, tokenizer, split, settings)
    del base  # only one of the two is in memory
    wrapper, tokenizer, _ = load_model_with_config(surgery_dir, overrides=overrides, **load)
    after = evaluate_model(wrapper, tokenizer, split, settings)
    result = compare_zero_init(before, after, wrapper, tokenizer, split, settings)
    write_json(output_path, result)
    return result


def compare_zero_init(
    baseline: Scored,
    surgery: Scored,
    wrapper: ChunkRefineWrapper,
    tokenizer: Any,
    split: TokenSplit,
    settings: EvaluationSettings,
) -> dict[str, Any]:
    """The proof.

    Checks, each of which can fail: perplexity and accuracy within 0.1 % of the baseline; every
    document's loss at every step equal to the baseline's; generations identical token for token
    (below float32 to the base's through the same chunked passes);
    logits of every step equal to step 0 bit for bit, and close to a plain forward of the base;
    and, with noise on any one cell, logits that do change.

    Args:
        baseline, surgery: What `evaluate_model` gave for the base and for the untrained cells.
        wrapper: The untrained cells around the base.
        settings: Of both evaluations; the first windows are used for the logits.

    Returns: `passed`, `checks`, the numbers.
    """
    (before, base_documents), (after, documents) = baseline, surgery
    windows = _windows(split, settings)
    logits = logit_differences(wrapper, windows)
    perturbed = perturbed_difference(wrapper, windows)
    perplexity = percent(before["perplexity"]["perplexity"], after["perplexity"]["perplexity"])
    accuracy = percent(
        before["perplexity"]["token_accuracy"], after["perplexity"]["token_accuracy"]
    )
    document_loss = _document_difference(base_documents, documents)
    tokens = [[s["token_ids"] for s in results["generations"]] for results in (before, after)]
    precision = torch.finfo(wrapper.base.dtype).eps
    # Below float32, decoding by token and by chunk round apart: compare like with like.
    if precision > 1e-6:
        tokens[0] = [
            _chunked_base_generation(wrapper, prompt_ids(tokenizer, s["prompt"]), settings)
            for s in after["generations"]
        ]
    tolerance = max(1e-4, 8 * precision) * logits["base_logit_scale"]
    checks = [
        _check("perplexity_difference_percent", perplexity, "<", MAX_DIFFERENCE_PERCENT),
        _check("token_accuracy_difference_percent", accuracy, "<", MAX_DIFFERENCE_PERCENT),
        _check("document_loss_difference", document_loss, "<=", 0.0),
        _check("generations_differing", sum(a != b for a, b in zip(*tokens, strict=True)), "<=", 0),
        _check("logit_difference_between_steps", logits["steps_vs_step_0"], "<=", 0.0),
        _check(
            "logit_difference_to_base_forward", logits["step_0_vs_base_forward"], "<", tolerance
        ),
        *(_check(f"logit_change_with_noise_on_{k}", v, ">", 0.0) for k, v in perturbed.items()),
    ]
    return {
        "passed": all(check["passed"] for check in checks),
        "perplexity_difference_percent": perplexity,
        "token_accuracy_difference_percent": accuracy,
        "max_logit_difference": logits["steps_vs_step_0"],
        "generations_identical": tokens[0] == tokens[1],
        "inner_steps": after["inner_steps"],
        "checks": checks,
    }


def _chunked_base_generation(
    wrapper: ChunkRefineWrapper, ids: list[int], settings: EvaluationSettings
) -> list[int]:
    """What the loop generates with no inner step: the base through the same passes."""
    input_ids = torch.tensor([ids], device=wrapper.device)
    output = wrapper.generate_chunks(input_ids, max_new_tokens=settings.max_new_tokens, num_steps=0)
    return output[0, len(ids) :].tolist()


def require_zero_init(path: str | Path) -> None:
    """The gate before training.

    Raises:
        ValueError: naming each failed check, its value and its limit.
    """
    result = read_json_object(path)
    failed = [c for c in result["checks"] if not c["passed"]]
    if failed or not result["passed"]:
        details = "; ".join(
            f"{c['name']} is {c['value']:.6g}, must be {c['limit']}" for c in failed
        )
        raise ValueError(f"zero-init proof failed, training does not start: {details} ({path})")


def _check(name: str, value: float, relation: str, limit: float) -> dict[str, Any]:
    passed = {"<": value < limit, "<=": value <= limit, ">": value > limit}[relation]
    return {"name": name, "value": value, "limit": f"{relation} {limit:g}", "passed": passed}


def _windows(split: TokenSplit, settings: EvaluationSettings) -> list[Window]:
    windows = document_windows(split, settings.context_length, 1)
    return next(batches(windows, settings.batch_size))


def _document_difference(baseline: pl.DataFrame, surgery: pl.DataFrame) -> float:
    """Largest difference of any document's summed loss at any inner step to the baseline's."""
    base = baseline.filter(pl.col("step") == 0)
    joined = surgery.join(
        base.select("document_id", "num_tokens", base_loss="loss_sum"),
        on=["document_id", "num_tokens"],
        how="left",
    )
    assert joined["base_loss"].null_count() == 0, "baseline and surgery scored different documents"
    return largest_difference(joined["loss_sum"], joined["base_loss"])
