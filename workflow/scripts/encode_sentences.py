from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.layout import Layout
    from kimi_recursive.track_b.teacher import encode_sentences

    encode_sentences(
        snakemake.params.teacher,
        snakemake.input.sentences,
        snakemake.output.teacher,
        Layout(Path(snakemake.config["results_dir"])).track_b.teacher_work,
    )
