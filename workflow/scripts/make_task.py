from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.data.settings import TaskSettings
    from kimi_recursive.data.tasks import make_task

    make_task(TaskSettings.from_mapping(snakemake.params.task), Path(snakemake.output.folder))
