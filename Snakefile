# Give a pretrained decoder a recursive refinement loop and measure what it does.
# Targets: all (default), summarize (from what is there, without training).


configfile: "config/config.yaml"


include: "rules/common.smk"
include: "rules/base.smk"
include: "rules/evaluate.smk"
include: "rules/train.smk"
include: "rules/report.smk"


localrules:
    all,
    summarize,


rule all:
    default_target: True
    input:
        # Every artefact, so that one that was deleted is made again.
        matrix_artefacts(),
        rules.summarize.output,
        rules.plot_perplexity_by_step.output,
