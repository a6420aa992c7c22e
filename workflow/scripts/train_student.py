from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.track_b.train import train_student

    train_student(
        snakemake.params.settings,
        snakemake.params.seed,
        snakemake.input.teacher,
        snakemake.input.neighbours,
        Path(snakemake.output.scores).parent,
        name=snakemake.params.name,
    )
