from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.evaluation.zero_init import require_zero_init
    from kimi_recursive.layout import RunFolder
    from kimi_recursive.matrix.runs import all_trainings, settings_of
    from kimi_recursive.matrix.settings import Config
    from kimi_recursive.processes.distributed import launch
    from kimi_recursive.training.phases import train_phase
    from kimi_recursive.training.spec import LoadOptions, PhaseSpec, Record, RunFiles

    config = Config.from_mapping(snakemake.config)
    training, resources = all_trainings(config)[snakemake.params.key], config.resources
    require_zero_init(snakemake.input.proof)
    run = RunFolder(Path(snakemake.output.sidecar).parent)
    launch(
        train_phase,
        resources.num_processes,
        PhaseSpec(
            phase=training.phase,
            # Also the settings that redo nothing.
            settings=settings_of(config, training),
            seed=snakemake.params.seed,
            arm=snakemake.params.arm,
            overrides=snakemake.params.recursive,
        ),
        RunFiles(
            parent=Path(snakemake.input.parent),
            tokens=Path(snakemake.input.tokens[0]).parent,
            sidecar=Path(snakemake.output.sidecar),
            logs=Path(snakemake.output.logs),
            summary=Path(snakemake.output.summary),
            work=run.work.folder,
            published=run.published,
        ),
        LoadOptions(device_map=resources.device_map, **snakemake.params.load),
        Record(name=snakemake.params.key, tracking=config.tracking),
    )
