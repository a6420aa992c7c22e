from kimi_recursive.jobs import job

with job(snakemake):
    from kimi_recursive.track_b.truth import find_neighbours

    find_neighbours(snakemake.input.teacher, snakemake.params.settings, snakemake.output.neighbours)
