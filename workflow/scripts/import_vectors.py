from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.track_b.teacher import import_vectors

    import_vectors(
        snakemake.params.teacher, **snakemake.params.split, output_dir=snakemake.output.teacher
    )
