from kimi_recursive.jobs import job

with job(snakemake):
    from kimi_recursive.track_b.teacher import import_vectors

    import_vectors(
        snakemake.params.teacher, **snakemake.params.split, output_dir=snakemake.output.teacher
    )
