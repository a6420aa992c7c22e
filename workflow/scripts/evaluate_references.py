from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.track_b.evaluate import evaluate_references

    evaluate_references(
        snakemake.input.teacher,
        snakemake.input.neighbours,
        snakemake.params.dims,
        snakemake.output.table,
    )
