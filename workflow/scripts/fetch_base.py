from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.training.base import fetch_base

    where = {key: snakemake.params.base[key] for key in ("path", "hub_id", "revision")}
    fetch_base(Path(snakemake.output.model), **where)
