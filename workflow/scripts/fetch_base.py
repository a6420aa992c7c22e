from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.training.fetch import fetch_base

    keys = ("path", "hub_id", "revision", "gguf_file", "package")
    where = {key: snakemake.params.base.get(key) for key in keys}
    fetch_base(Path(snakemake.output.model), **where)
