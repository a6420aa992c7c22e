from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.data.corpus import prepare_corpus

    prepare_corpus(snakemake.params.corpus, Path(snakemake.output.facts).parent)
