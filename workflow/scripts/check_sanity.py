from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.track_b.sanity import check_sanity

    check_sanity(snakemake.input.teacher, snakemake.input.neighbours, snakemake.output.checks)
