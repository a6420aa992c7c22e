"""`kimi-recursive plan`: what a matrix will need, before it is started."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

GIB = 2**30


def plan(
    config: Annotated[
        Path | None,
        typer.Option(
            "--configfile",
            "--config",
            help="YAML with the keys that differ from config/config.yaml.",
        ),
    ] = None,
    gpu_memory: Annotated[float, typer.Option(help="Memory of one GPU, in GiB.")] = 80.0,
    tflops: Annotated[
        float, typer.Option(help="Peak TFLOP/s of one GPU, dense, in the base's dtype.")
    ] = 989.0,
    mfu: Annotated[
        float, typer.Option(help="Share of the peak that is reached: an assumption, measure yours.")
    ] = 0.3,
    measure: Annotated[
        bool,
        typer.Option(
            "--measure",
            help="Also run 16 steps of each phase here, with random weights, and report tokens/s, "
            "time and memory of the process. Takes minutes; the base must fit this machine.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers, in bytes and FLOPs.")] = (
        False
    ),
) -> None:
    """Estimate parameters, memory, GPUs, tokens per second and disk of every phase and variant.

    The real code runs on tensors without storage, so no weights are needed. Memory counts tensors
    only: libraries, text and the allocator's reserve come on top. GPUs is how many hold the model
    when its layers are spread over them (resources.device_map); one computes at a time.
    """
    for name, value in {"--gpu-memory": gpu_memory, "--tflops": tflops, "--mfu": mfu}.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name}: must be above 0, got {value}")
    if config is not None and not config.is_file():
        raise ValueError(f"{config}: no such file (--configfile)")
    from kimi_recursive.matrix.settings import read_config
    from kimi_recursive.processes.logs import quiet_libraries

    quiet_libraries()
    paths = [Path("config/config.yaml"), *([config] if config else [])]
    settings = read_config(paths)
    from kimi_recursive.plan.estimate import plan

    found = plan(settings)
    if measure:
        from kimi_recursive.plan.measure import measure as measured

        found["measured"] = measured(settings, found["runs"])
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(plan_text(found, gpu_memory * GIB, tflops * 1e12 * mfu))


def plan_text(found: dict[str, Any], gpu_bytes: float, flops_per_second: float) -> str:
    """Tables of at most 100 columns."""
    from kimi_recursive.plan.estimate import gpus_needed
    from kimi_recursive.tables import NAME, NUMBER, Column, Table

    sizes = found["num_parameters"]
    rows = []
    for name, run in found["runs"].items():
        parts = [run[f"{part}_bytes"] / GIB for part in ("weight", "optimizer", "peak")]
        per_token = run["flops"] / run["tokens"]
        rows.append([
            _label(name), _count(run["num_trainable"]), *(f"{part:.2f}" for part in parts),
            f"{sum(parts):.2f}", gpus_needed(run, gpu_bytes), f"{per_token / 1e9:.3g}",
            f"{flops_per_second / per_token:.0f}", f"{run['checkpoint_bytes'] / GIB:.3f}",
        ])  # fmt: skip
    headings = ("trained", "weights GiB", "optimizer GiB", "activations + grad GiB", "total GiB",
                "GPUs", "GFLOP /token", "tokens/s", "checkpoint GiB")  # fmt: skip
    note = (
        f"Memory of tensors. GPUs of {gpu_bytes / GIB:g} GiB, of which 90 % can be used. Tokens/s "
        f"at {flops_per_second / 1e12:g} TFLOP/s, an assumption."
    )
    trainings = found["trainings"]
    hours = trainings["flops"] / flops_per_second / 3600
    total = (
        f"All {trainings['num_trainings']} trainings (arms, phases, seeds, variants, repeat): at "
        f"most {trainings['flops']:.3g} FLOPs, {hours:.3g} hours at that rate."
    )
    caption = (
        f"base {_count(sizes['base'])} parameters in {found['dtype']}, "
        f"sidecar {_count(sizes['sidecar'])} in float32"
    )
    columns = [Column("", NAME), *(Column(heading, NUMBER) for heading in headings)]
    tables = [Table(caption, columns, rows, [note, total])]
    if "measured" in found:
        rows = [
            [
                _label(name), f"{run['tokens_per_second']:.0f}",
                f"{run['resident_bytes'] / GIB:.2f}",
                f"{run['minutes']:.1f}" if "minutes" in run else None,
            ]
            for name, run in found["measured"].items()
        ]  # fmt: skip
        headings = ("tokens/s", "process GiB", "minutes")
        columns = [Column("", NAME), *(Column(heading, NUMBER) for heading in headings)]
        tables.append(Table("measured here:", columns, rows))
    return "\n\n".join(table.to_text() for table in tables)


def _label(run: str) -> str:
    """`phase a of deep` for the run `a-deep`."""
    name, _, variant = run.partition("-")
    label = name if name == "evaluation" else f"phase {name}"
    return f"{label} of {variant}" if variant else label


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.2f}{unit}"
    return str(number)
