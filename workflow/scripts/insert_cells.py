from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.matrix.runs import surgeries
    from kimi_recursive.matrix.settings import Config
    from kimi_recursive.training.surgery import insert_cells

    seeds = {cells.name: cells.seed for cells in surgeries(Config.from_mapping(snakemake.config))}
    insert_cells(
        Path(snakemake.input.model),
        snakemake.params.recursive,
        seed=seeds[snakemake.wildcards.cells],
        output_dir=Path(snakemake.output.sidecar),
        device_map=snakemake.config["resources"]["device_map"],
        **snakemake.params.load,
    )
