from kimi_recursive.jobs import job

with job(snakemake):
    from kimi_recursive.track_b.sanity import check_sanity

    check_sanity(snakemake.input.teacher, snakemake.input.neighbours, snakemake.output.checks)
