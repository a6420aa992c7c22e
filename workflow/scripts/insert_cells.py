from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.training.surgery import insert_cells

    insert_cells(
        Path(snakemake.input.model),
        snakemake.params.recursive,
        seed=int(snakemake.wildcards.seed),
        output_dir=Path(snakemake.output.sidecar),
        device_map=snakemake.config["resources"]["device_map"],
        **snakemake.params.load,
    )
