from pathlib import Path

from kimi_recursive.matrix.job import job

with job(snakemake):
    from kimi_recursive.evaluation.settings import TaskSettings, TaskSpec
    from kimi_recursive.evaluation.tasks import evaluate_tasks
    from kimi_recursive.layout import Layout

    name, step = snakemake.wildcards.name, int(snakemake.wildcards.step)
    settings = TaskSettings(**snakemake.params.tasks)
    evaluate_tasks(
        TaskSpec(snakemake.params.stage, step, settings, snakemake.params.upstream),
        Path(snakemake.input.model),
        corpus=snakemake.input.corpus,
        task_files=snakemake.input.tasks,
        files=Layout(Path(snakemake.config["results_dir"])).tasks(name, step),
        device_map=snakemake.config["resources"]["device_map"],
        **snakemake.params.load,
    )
