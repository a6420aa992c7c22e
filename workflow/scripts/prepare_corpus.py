from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.data.corpus import prepare_corpus

    # With a task, the source is what the task's rule wrote.
    corpus = {**snakemake.params.corpus, "source": snakemake.params.source, "task": None}
    prepare_corpus(corpus, Path(snakemake.output.facts).parent)
