from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.training.fetch import fetch_base

    fetch_base(Path(snakemake.output.model), **snakemake.params.base)
