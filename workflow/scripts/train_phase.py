from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.evaluation.zero_init import require_zero_init
    from kimi_recursive.matrix.settings import num_processes
    from kimi_recursive.processes.distributed import launch
    from kimi_recursive.training.phases import train_phase

    require_zero_init(snakemake.input.proof)
    launch(
        train_phase,
        num_processes(snakemake.config),
        snakemake.params.phase,
        snakemake.params.settings,
        snakemake.params.seed,
        arm=snakemake.params.arm,
        overrides=snakemake.params.recursive,
        name=snakemake.params.key,
        parent_dir=Path(snakemake.input.parent),
        tokens_dir=Path(snakemake.input.tokens[0]).parent,
        output_dir=Path(snakemake.output.sidecar),
        logs_path=Path(snakemake.output.logs),
        summary_path=Path(snakemake.output.summary),
        work_dir=Path(snakemake.output.sidecar).parent / "work",
        device_map=snakemake.config["resources"]["device_map"],
        **snakemake.params.load,
    )
