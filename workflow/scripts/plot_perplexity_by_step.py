from pathlib import Path

from kimi_recursive.jobs import job

with job(snakemake):
    from kimi_recursive.figures import plot_perplexity_by_step

    plot_perplexity_by_step([Path(path) for path in snakemake.input], Path(snakemake.output.figure))
