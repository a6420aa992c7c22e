from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.report.figures import plot_perplexity_by_step

    plot_perplexity_by_step([Path(path) for path in snakemake.input], Path(snakemake.output.figure))
