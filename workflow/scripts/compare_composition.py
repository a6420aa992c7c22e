from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.matrix.settings import Config
    from kimi_recursive.report.composition import compare_composition

    compare_composition(
        Config.from_mapping(snakemake.params.config),
        table=Path(snakemake.output.table),
        answer=Path(snakemake.output.answer),
        figure=Path(snakemake.output.figure),
    )
