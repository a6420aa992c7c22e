from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.training.base import fetch_base

    fetch_base(snakemake.params.base, Path(snakemake.output.model))
