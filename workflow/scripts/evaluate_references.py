from kimi_recursive.jobs import job

with job(snakemake):
    from kimi_recursive.track_b.evaluate import evaluate_references

    evaluate_references(
        snakemake.input.teacher,
        snakemake.input.neighbours,
        snakemake.params.dims,
        snakemake.output.table,
    )
