# Give a pretrained decoder a recursive refinement loop and measure what it does.
# Targets: all (default), track_b (the embedding students alone), composition (the positive control
# alone); from what exists, without training: summarize, summarize_track_b, report.


configfile: "config/config.yaml"


report: "workflow/report/workflow.rst"


include: "rules/matrix.smk"


if config["track_b"]["enabled"]:

    include: "rules/track_b.smk"


if COMPOSITION:

    include: "rules/composition.smk"


# Too light for a job of their own on a cluster.
localrules:
    all,
    track_b,


# Before Snakemake deletes the old summary, and before it trains.
onstart:
    if asked_for("summarize"):
        refuse_results_of_another_config()
    elif TASKS and not asked_for("report"):
        refuse_unknown_tasks()
    if trains_here():
        prefork.start()


# Snakemake itself says only that jobs failed.
onerror:
    say_why_it_stopped(log)


rule all:
    default_target: True
    input:
        # Every artefact, so that one that was deleted is made again.
        MATRIX_ARTEFACTS,
        rules.summarize.output,
        rules.plot_perplexity_by_step.output,
        track_b_results(),
        composition_results(),
        rules.report.output,


rule track_b:
    input:
        track_b_results(),


rule composition:
    input:
        composition_results(),


onsuccess:
    print_summaries()
