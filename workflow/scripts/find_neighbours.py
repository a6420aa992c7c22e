from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.track_b.truth import find_neighbours

    find_neighbours(snakemake.input.teacher, snakemake.params.settings, snakemake.output.neighbours)
