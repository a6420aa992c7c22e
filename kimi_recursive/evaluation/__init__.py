"""Evaluation: scores by inner step, FLOPs, proofs, intervals, the harness."""

from kimi_recursive.doors import offer

__getattr__, __dir__ = offer(
    __name__,
    scores="evaluate_model",
    stage="evaluate_stage",
    zero_init="compare_zero_init prove_zero_init require_zero_init",
    repeat="compare_repeat",
    bootstrap="paired_bootstrap compare_documents",
)
