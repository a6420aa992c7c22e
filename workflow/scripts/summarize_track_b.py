from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.layout import Layout
    from kimi_recursive.records.runs import record_runs
    from kimi_recursive.track_b.publish import summarize_track_b

    summarize_track_b(
        snakemake.params.track_b,
        Layout(Path(snakemake.config["results_dir"])).folder,
        **snakemake.output,
    )
    record_runs(Layout(Path(snakemake.config["results_dir"])).folder)
