from pathlib import Path

from kimi_recursive.jobs import job

with job(snakemake):
    from kimi_recursive.base import fetch_base

    fetch_base(snakemake.params.base, Path(snakemake.output.model))
