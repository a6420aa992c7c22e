"""`summary.txt`: the questions of the matrix, answered in at most 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kimi_recursive.text import fit, label

TARGET_INNER_STEPS = (1.0, 2.0)


def perplexity(value: float) -> str:
    """Of a model that diverged it is too long for a column."""
    return f"{value:.4f}" if value < 1e6 else f"{value:.4e}"


def percent(value: float) -> str:
    """A difference in percent."""
    return f"{value:+.3f} %" if abs(value) < 1e4 else f"{value:+.1e} %"


def summary_text(
    rows: list[dict[str, Any]],
    proofs: Mapping[int, tuple[dict[str, Any] | None, str]],
    comparisons: list[dict[str, Any]],
    repeat: tuple[dict[str, Any] | None, str] | None,
) -> str:
    """Args: rows of `summary.csv`; by seed the zero-init proof, or None and what is wrong with it;
    the comparisons of `summary.compare_arms`; `compare_repeat`'s result or what is wrong with it,
    None when not asked for."""
    done = [row for row in rows if row["status"] == "ok"]
    lines = [f"Kimi Recursive: {len(done)} of {len(rows)} expected evaluations are there"]
    lines += ["", "Does zero-init preserve the base?", *zero_init_lines(proofs)]
    lines += ["", "Does recursion help?", *_help(comparisons)]
    lines += ["", "Is it efficient?", *_efficiency(done)]
    lines += ["", "Is it reproducible?", *repeat_lines(repeat)]
    lines += ["", "What each evaluation cost", *_cost(done)]
    lines += ["", "Perplexity on held-out documents, by inner step", *_perplexity(done)]
    absent = [row for row in rows if row["status"] != "ok"]
    if absent:
        lines += ["", "Not there"]
        lines += [f"{label(r['name'])}{r['status']}  {r['detail']}".rstrip() for r in absent]
    return fit(lines)


def interval(low: float, high: float) -> str:
    """In percent."""
    return f"[{percent(low)[:-2]}, {percent(high)[:-2]}] %"


def zero_init_lines(proofs: Mapping[int, tuple[dict[str, Any] | None, str]]) -> list[str]:
    lines = []
    for seed, (proof, problem) in proofs.items():
        if proof is None:
            lines.append(f"Zero-init proof (seed {seed}): {problem or 'missing'}")
            continue
        checks = proof["checks"]
        failed = [check for check in checks if not check["passed"]]
        lines.append(
            f"Zero-init proof (seed {seed}): {'PASSED' if proof['passed'] else 'FAILED'}, "
            f"{len(checks) - len(failed)} of {len(checks)} checks"
        )
        lines.append(
            f"  perplexity differs by {proof['perplexity_difference_percent']:.3g} %, "
            f"logits of steps 1..{proof['inner_steps']} by {proof['max_logit_difference']:.3g}, "
            f"generations {'identical' if proof['generations_identical'] else 'DIFFER'}"
        )
        lines += [f"  failed: {c['name']} = {c['value']:.6g}, must be {c['limit']}" for c in failed]
    return lines


def _help(comparisons: list[dict[str, Any]]) -> list[str]:
    if not comparisons:
        return ["(no trained recursive arm, or nothing to compare it with)"]
    lines, most = [], max(len(c["seeds"]) for c in comparisons)
    for stage in dict.fromkeys(c["arm"] for c in comparisons):
        against = f"{stage} against"
        lines.append(f"{against:<33}{'perplexity':>11}{'95 % interval':>22}  verdict")
        for c in comparisons:
            if c["arm"] != stage:
                continue
            if c["verdict"] is None:
                lines.append(f"  {c['reference']:<31}{c['problem']}")
                continue
            mean, low, high = c["perplexity_percent"]
            few = f" ({len(c['seeds'])} of {most} seeds)" if len(c["seeds"]) < most else ""
            lines.append(
                f"  {c['reference']:<31}{percent(mean):>11}{interval(low, high):>22}  "
                f"{c['verdict']}{few}"
            )
    first = next((c for c in comparisons if c["verdict"]), None)
    if first is None:
        return lines
    over = f"{first['num_documents']} documents"
    if most > 1:
        over += f" and {most} seeds"
    else:
        over += "; one seed, so it says nothing of the spread over seeds"
    lines.append(f"(step {first['arm_step']}; paired bootstrap over {over})")
    return lines


def _efficiency(done: list[dict[str, Any]]) -> list[str]:
    arms = {}
    for row in done:
        if row.get("arm") == "recursive":
            arms.setdefault(row["stage"], []).append(row)
    base = next((row for row in done if row["stage"] == "baseline"), None)
    if not arms:
        return ["(no trained recursive arm)"]
    low, high = TARGET_INNER_STEPS
    target = f"target {low:.0f}-{high:.0f}"
    lines = [
        f"{'':<29}{'mean':>7}{target:>12}{'scored':>10}{'generated':>12}{'stopped early':>24}",
        f"{'evaluation':<29}{'steps':>7}{'':>12}{'tok/s':>10}{'tok/s':>12}{'steps':>12}"
        f"{'perplexity':>12}",
    ]
    for stage, rows in arms.items():
        steps = mean_of(rows, "mean_inner_steps")
        within = "within" if low <= steps <= high else "outside"
        lines.append(
            f"{label(stage)}{steps:>7.2f}{within:>12}"
            f"{times_baseline(rows, base, 'evaluated_tokens_per_second'):>10}"
            f"{times_baseline(rows, base, 'generated_tokens_per_second'):>12}"
            f"{mean_of(rows, 'halting_mean_inner_steps'):>12.2f}"
            f"{perplexity(mean_of(rows, 'halting_perplexity')):>12}"
        )
    lines += [
        "(mean steps: of a round of generation; tok/s: times the baseline's; stopped early: each",
        "chunk where the boundary head says so)",
    ]
    return lines


def times_baseline(rows: list[dict[str, Any]], base: Mapping[str, Any] | None, key: str) -> str:
    """A mean as a multiple of the baseline's value; nothing where one is not there."""
    if not base or not base[key] or any(not row[key] for row in rows):
        return "-"
    return f"{mean_of(rows, key) / base[key]:.2f}x"


def repeat_lines(repeat: tuple[dict[str, Any] | None, str] | None) -> list[str]:
    if repeat is None:
        return ["(not asked for: repeat is false)"]
    found, problem = repeat
    if found is None:
        return [f"Repeated run: {problem or 'missing'}"]
    if found["identical"]:
        return [
            f"{found['run']} trained and evaluated twice: weights, the log of all "
            f"{found['num_steps']} steps and",
            f"  the losses of {found['num_documents']} documents are identical, bit for bit",
        ]
    d = found["max_differences"]
    return [
        f"{found['run']} trained and evaluated twice DIFFERS: weights by {d['weights']:.3g}, "
        f"training loss by",
        f"  {d['training_loss']:.3g}, a document's summed loss by {d['document_loss']:.3g} nats",
    ]


def _cost(done: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'evaluation':<29}{'trained':>9}{'tokens':>9}{'training':>10}{'forward':>11}"
        f"{'mean':>7}{'scored':>9}{'generated':>11}",
        f"{'':<29}{'params':>9}{'':>9}{'FLOP':>10}{'MFLOP/tok':>11}{'steps':>7}{'tok/s':>9}"
        f"{'tok/s':>11}",
    ]
    for row in done:
        trained = row["training"]
        lines.append(
            f"{label(row['name'])}"
            + (f"{row['num_trainable_parameters'] / 1e6:>8.2f}M" if trained else f"{'-':>9}")
            + (f"{num_tokens(row['training_tokens']):>9}" if trained else f"{'-':>9}")
            + (f"{row['training_flops']:>10.2e}" if trained else f"{'-':>10}")
            + f"{row['forward_flops_per_token'] / 1e6:>11.2f}"
            + f"{row['mean_inner_steps']:>7.2f}"
            + f"{row['evaluated_tokens_per_second']:>9.0f}"
            + f"{row['generated_tokens_per_second'] or 0:>11.1f}"
        )
    lines.append("(tokens and FLOP of a phase include those of the phases before it)")
    unchanged = [row["name"] for row in done if row["training"] and row["best_step"] == 0]
    lines += [
        f"({name}: no step was better on validation than the start, which is shown)"
        for name in unchanged
    ]
    return lines


def num_tokens(number: float) -> str:
    """In thousands, or in millions where there are as many."""
    return f"{number / 1e3:.0f}k" if number < 1e6 else f"{number / 1e6:.1f}M"


def mean_of(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / len(rows)


def _perplexity(done: list[dict[str, Any]]) -> list[str]:
    base = next((row for row in done if row["stage"] == "baseline"), None)
    lines = [f"{'evaluation':<29}{'step':>5}{'perplexity':>12}{'vs baseline':>13}{'accuracy':>10}"]
    for row in done:
        for step in row["by_step"]:
            change = ""
            if base:
                change = percent(100 * (step["perplexity"] / base["perplexity"] - 1))
            name = row["name"] if step["step"] == 0 else ""
            untrained = "  beyond the trained depth" if step["step"] > row["inner_steps"] else ""
            lines.append(
                f"{label(name)}{step['step']:>5}{perplexity(step['perplexity']):>12}{change:>13}"
                f"{100 * step['token_accuracy']:>8.2f} %{untrained}"
            )
    if done:
        lines.append(
            f"({done[0]['num_tokens']:,} tokens of {done[0]['num_documents']} documents; lower "
            "perplexity is better)"
        )
    return lines
