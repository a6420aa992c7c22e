from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.evaluation.repeat import compare_repeat

    compare_repeat(
        snakemake.params.key,
        sidecars=[Path(path) for path in snakemake.input.sidecars],
        logs=snakemake.input.logs,
        documents=snakemake.input.documents,
        output_path=snakemake.output.comparison,
    )
