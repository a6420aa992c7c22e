from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.track_b.sentences import prepare_sentences

    prepare_sentences(
        snakemake.params.corpus, **snakemake.params.split, output_path=snakemake.output.sentences
    )
