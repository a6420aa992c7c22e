from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.evaluation.zero_init import require_zero_init
    from kimi_recursive.layout import RunFolder
    from kimi_recursive.matrix.settings import Resources
    from kimi_recursive.processes.distributed import launch
    from kimi_recursive.training.phases import train_phase

    phase, resources = snakemake.params.phase, Resources(**snakemake.config["resources"])
    require_zero_init(snakemake.input.proof)
    launch(
        train_phase,
        resources.num_processes,
        phase,
        snakemake.config["training"][phase],  # also the settings that redo nothing
        snakemake.params.seed,
        arm=snakemake.params.arm,
        overrides=snakemake.params.recursive,
        name=snakemake.params.key,
        parent_dir=Path(snakemake.input.parent),
        tokens_dir=Path(snakemake.input.tokens[0]).parent,
        output_dir=Path(snakemake.output.sidecar),
        logs_path=Path(snakemake.output.logs),
        summary_path=Path(snakemake.output.summary),
        work_dir=RunFolder(Path(snakemake.output.sidecar).parent).work.folder,
        device_map=resources.device_map,
        **snakemake.params.load,
    )
